"""What EctoWatch's own tests cover, asked of pgsignals: a counterpart for each of its 43 cases.

The numbers in brackets are those of the cases in the order of its test file. Where the answer
differs on purpose, the docstring says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

import pgsignals
from pgsignals import ConfigurationError, Hub, ReceiverError, WatcherError, watch
from tests.conftest import DEADLINE, Database, Recorder


class Base(orm.DeclarativeBase):
    pass


class Thing(Base):
    """A model whose attributes are not called like its columns."""

    __tablename__ = "things"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    text: orm.Mapped[str | None] = orm.mapped_column()
    number: orm.Mapped[int | None] = orm.mapped_column()
    ratio: orm.Mapped[float | None] = orm.mapped_column("theRatio")
    parent_id: orm.Mapped[int | None] = orm.mapped_column(sa.ForeignKey("things.id"))
    other_id: orm.Mapped[int | None] = orm.mapped_column("otherParent", sa.ForeignKey("things.id"))


LONG = "t" * 63
OTHER = '"0xabcd".other'


@pytest.fixture(autouse=True)
def things(db: Database) -> None:
    """Two things, the second a child of the first, and tables with odd names."""
    db(
        'CREATE TABLE things (id serial PRIMARY KEY, text text, number int, "theRatio" float8,'
        ' parent_id int REFERENCES things, "otherParent" int REFERENCES things, extra_field text)'
    )
    db('INSERT INTO things (text, number, "theRatio") VALUES (%s, 4455, 84.52)', ["a value"])
    db('INSERT INTO things (text, number, "theRatio", parent_id) VALUES (%s, 8899, 24.52, 1)', "b")
    db('CREATE SCHEMA "0xabcd"; CREATE TABLE "0xabcd".other (weird_id int PRIMARY KEY)')
    db(f"CREATE TABLE {LONG} (id serial PRIMARY KEY)")
    db("CREATE TABLE parts (id int) PARTITION BY RANGE (id)")
    db("CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100)")


@pytest.fixture
def sentinel(db: Database, hub: Hub) -> Callable[[], None]:
    """Waits until all that was written before has been delivered, to prove what did not arrive.

    A watcher under the label ``sentinel`` has to be among the hub's.
    """
    db("CREATE TABLE sentinel (id serial PRIMARY KEY)")

    def wait() -> None:
        with hub.stream("sentinel") as events:
            db("INSERT INTO sentinel DEFAULT VALUES")
            assert events.get(DEADLINE) is not None

    return wait


SENTINEL = watch("sentinel", "inserted", label="sentinel")
Sentinel = Callable[[], None]


def subscribed(hub: Hub, target: Any, *ops: str, **filters: Any) -> tuple[Recorder, Any]:
    """A recorder of what arrives, and what ends it."""
    recorder = Recorder()
    return recorder, hub.subscribe(recorder, target, *ops, **filters)


class Pair:
    """A receiver of a model, and one of a label on the same table, of one operation."""

    def __init__(self, hub: Hub, dsn: str, op: str, options: dict[str, Any], **filters: Any):
        hub.start(
            dsn,
            [
                watch(Thing, op, **options),
                watch("things", op, label="too", **options),
                SENTINEL,
            ],
        )
        self.model, self.end_model = subscribed(hub, Thing, op, **filters)
        self.label, self.end_label = subscribed(hub, "too", **filters)

    @property
    def counts(self) -> tuple[int, int]:
        """How many events each has got."""
        return len(self.model.items), len(self.label.items)

    @property
    def found(self) -> list[list[tuple[Any, dict[str, Any]]]]:
        """The ids and values of the events that each has got."""
        return [[(e.id, e.values) for e in each.items] for each in (self.model, self.label)]


CHILDREN = {"extra": ["parent_id"]}


def ids(recorder: Recorder) -> list[Any]:
    """The ids of all that has arrived."""
    return [event.id for event in recorder.items]


class TestArgumentValidation:
    @pytest.mark.parametrize(
        "given", ["host=127.0.0.1 port=1", "postgresql://me:s3cret@127.0.0.1:1/x", "not a dsn"]
    )
    def test_the_database_has_to_be_there(self, hub: Hub, given: str) -> None:
        """[1] A database that cannot be reached is an error of start, without its password."""
        with pytest.raises(pgsignals.ConnectError, match="Cannot connect to PostgreSQL at ") as e:
            hub.start(given, [Thing])
        assert "s3cret" not in str(e.value)

    @pytest.mark.parametrize("given", [321, None, [Thing]])
    def test_the_database_is_given_as_text(self, hub: Hub, given: Any) -> None:
        """[1] Anything but a text in its place is named."""
        with pytest.raises(ConfigurationError, match=f"dsn={re.escape(repr(given))}: give a con"):
            hub.start(given, [Thing])

    @pytest.mark.parametrize(
        ("option", "value"), [("delivery", "pubsub"), ("install", 123), ("workers", None)]
    )
    def test_options_have_to_be_known(self, hub: Hub, dsn: str, option: str, value: Any) -> None:
        """[2] There is no pub/sub to name; the options that there are get checked alike."""
        options: dict[str, Any] = {option: value}
        with pytest.raises(ConfigurationError, match=f"{option}={value!r}"):
            hub.start(dsn, [Thing], **options)

    @pytest.mark.parametrize(
        ("watchers", "message"),
        [
            ([], "nothing to watch"),
            (7, "watchers=7: give a list"),
            ([int], "is not something that pgsignals can watch"),
            ([(Thing, "frobbed")], "unknown operation 'frobbed'"),
            ([()], "is not a watcher"),
            ([(Thing, "inserted", {}, 1)], "is not a watcher"),
            ([{}], "is not something that pgsignals can watch"),
            ([watch(Thing, label="a"), watch("parts", label="a")], "have the label 'a'"),
            ([Thing, (Thing, "inserted")], r"deliver \(Thing, 'inserted'\)"),
        ],
    )
    def test_watchers(self, hub: Hub, dsn: str, watchers: Any, message: str) -> None:
        """[3a-o] Each kind of wrong watcher has its message; more in test_watchers."""
        with pytest.raises(ConfigurationError, match=message):
            hub.start(dsn, watchers)

    @pytest.mark.parametrize("value", [1, [1]])
    @pytest.mark.parametrize("option", ["columns", "extra"])
    def test_options_of_a_watcher(self, option: str, value: Any) -> None:
        """[3i-m] Lists of columns are lists of names."""
        options: dict[str, Any] = {option: value}
        with pytest.raises(WatcherError, match=rf"{option}={re.escape(repr(value))}: give a list"):
            watch(Thing, "updated", **options)

    @pytest.mark.parametrize("op", ["inserted", "deleted", "truncated"])
    def test_only_updates_have_columns_that_change(self, op: str) -> None:
        """[4] ``columns`` with any operation but ``updated`` is refused."""
        with pytest.raises(WatcherError, match="columns belong to 'updated' alone"):
            watch(Thing, op, columns=["text"], label="x")

    @pytest.mark.parametrize("option", ["columns", "extra"])
    def test_columns_have_to_be_attributes(self, hub: Hub, dsn: str, option: str) -> None:
        """[5] The first that is wrong is named, with all that the model has, by its names."""
        options: dict[str, Any] = {option: ["number", "no_such", "nor_this"]}
        with pytest.raises(WatcherError, match=r"no column 'no_such'.*ratio, parent_id, other_id"):
            hub.start(dsn, [watch(Thing, "updated", label="x", **options)])

    def test_columns_need_no_label(self, hub: Hub, dsn: str, db: Database) -> None:
        """[6] Unlike there, receivers of the model get what a watcher with ``columns`` delivers."""
        hub.start(dsn, [watch(Thing, "updated", columns=["number"])])
        recorder, _ = subscribed(hub, Thing, "updated")
        db("UPDATE things SET text = 'c'; UPDATE things SET number = 1 WHERE id = 2")
        assert recorder.wait(1)[0].id == 2

    @pytest.mark.parametrize("extra", [(1,), ("updated", 1)])
    def test_an_id_is_not_an_operation(self, hub: Hub, extra: tuple[Any, ...]) -> None:
        """[7] Whoever passes an id by position is told what operations there are."""
        with pytest.raises(ReceiverError, match=r"^1 is not an operation\. Operations are 'ins"):
            hub.on(Thing, *extra)(Recorder())

    def test_receivers_may_come_before_start(self, hub: Hub, dsn: str) -> None:
        """[8] Subscribing needs no running hub here; what needs one says so."""
        subscribed(hub, Thing)
        subscribed(hub, Thing, id=1)
        subscribed(hub, Thing, parent_id=1)
        with pytest.raises(pgsignals.StateError, match="not running"):
            hub.status()

    def test_nothing_to_watch_is_refused(self, hub: Hub, dsn: str) -> None:
        """[9] There an empty list is allowed; here it is taken for the mistake that it is."""
        with pytest.raises(ConfigurationError, match="give at least one watcher"):
            hub.start(dsn, [])

    def test_the_longest_name_of_a_table(self, hub: Hub, dsn: str, db: Database) -> None:
        """[10] No name is too long: ours are hashes."""
        hub.start(dsn, [(LONG, "inserted")])
        recorder, _ = subscribed(hub, LONG)
        db(f"INSERT INTO {LONG} DEFAULT VALUES")
        assert recorder.wait(1)[0].table == LONG

    def test_the_longest_label(self, hub: Hub, dsn: str, db: Database) -> None:
        """[11] Labels of any length work, also on the table with the longest name."""
        hub.start(dsn, [watch(LONG, "inserted", label="x" * 500)])
        recorder, _ = subscribed(hub, "x" * 500)
        db(f"INSERT INTO {LONG} DEFAULT VALUES")
        assert recorder.wait(1)[0].label == "x" * 500

    @pytest.mark.parametrize("filters", [{}, {"id": 1}, {"parent_id": 1}])
    def test_subscribing_to_what_is_no_model(
        self, hub: Hub, dsn: str, filters: dict[str, Any]
    ) -> None:
        """[12] Something that no watcher has is refused in every form."""
        hub.start(dsn, [(Thing, "updated")])
        with pytest.raises(ReceiverError, match=r"\(int, 'updated'\), which no watcher delivers"):
            subscribed(hub, int, "updated", **filters)

    @pytest.mark.parametrize("filters", [{}, {"id": 1}, {"parent_id": 1}])
    @pytest.mark.parametrize("op", ["frobbed", 7])
    def test_subscribing_to_what_is_no_operation(
        self, hub: Hub, dsn: str, op: Any, filters: dict[str, Any]
    ) -> None:
        """[13] An unknown operation is refused in every form."""
        hub.start(dsn, [(Thing, "updated")])
        with pytest.raises(ReceiverError, match=f"{op!r} is not an operation.*'inserted', 'up"):
            subscribed(hub, Thing, op, **filters)


class TestStrayTriggers:
    @pytest.fixture(autouse=True)
    def foreign(self, db: Database) -> None:
        """Triggers of somebody else's, one of them called like ours, one on the partitioned."""
        body = "() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
        db(f"CREATE FUNCTION foreign_func{body}; CREATE FUNCTION pgsignals_func{body}")
        for name, table, function in (
            ("foreign_trigger", "things", "foreign_func"),
            ("pgsignals_trigger", "things", "pgsignals_func"),
            ("foreign_partition_trigger", "parts", "foreign_func"),
        ):
            db(
                f"CREATE TRIGGER {name} AFTER INSERT ON {table}"
                f" FOR EACH ROW EXECUTE FUNCTION {function}()"
            )

    def names(self, db: Database) -> set[str]:
        """All triggers but those of partitions."""
        query = "SELECT tgname::text FROM pg_trigger WHERE NOT tgisinternal AND tgparentid = 0"
        return {name for (name,) in db(query)}

    def test_stray_triggers_are_told(self, hub: Hub, dsn: str, db: Database) -> None:
        """[14] ``status`` lists ours that no watcher needs, each partitioned table's once."""
        with Hub().start(dsn, ["parts", (Thing, "deleted")]):
            pass
        hub.start(dsn, [watch(Thing, "inserted", label="x")], prune=False)
        stray = [state for state in hub.status().watchers if state.label != "x"]
        assert [(state.table, state.op) for state in stray] == [
            ("parts", "deleted"),
            ("parts", "inserted"),
            ("parts", "updated"),
            ("things", "deleted"),
        ]
        assert not {"foreign_trigger", "pgsignals_trigger"} & {state.name for state in stray}

    def test_stray_triggers_are_removed(self, hub: Hub, dsn: str, db: Database) -> None:
        """[15] A start removes ours that nobody needs any more, and never what is not ours."""
        foreign = self.names(db)
        with Hub().start(dsn, ["parts", (Thing, "deleted")]):
            assert len(self.names(db) - foreign) == 4
        hub.start(dsn, [watch(Thing, "inserted", label="x")])
        assert self.names(db) - foreign == {hub.status().watchers[0].name}
        assert foreign < self.names(db)
        assert db("SELECT count(*) FROM pg_proc WHERE proname LIKE 'pgsignals%'") == [(2,)]


class TestInserts:
    def test_an_id_that_does_not_exist_yet(self, hub: Hub, dsn: str, db: Database) -> None:
        """[16] Refused there; here one may wait for a record whose key is known beforehand."""
        hub.start(dsn, [(Thing, "inserted")])
        recorder, _ = subscribed(hub, Thing, "inserted", id=123)
        db("INSERT INTO things DEFAULT VALUES; INSERT INTO things (id) VALUES (123)")
        assert ids(recorder) == [] or ids(recorder) == [123]
        assert recorder.wait(1)[0].id == 123

    @pytest.mark.parametrize("options", [{}, {"extra": []}], ids=["default", "empty extra"])
    def test_inserts(
        self,
        hub: Hub,
        dsn: str,
        db: Database,
        sentinel: Sentinel,
        options: dict[str, Any],
    ) -> None:
        """[17, 18] Models, names and labels all get it; ending one subscription ends only it."""
        hub.start(
            dsn,
            [
                watch(Thing, "inserted", **options),
                watch(OTHER, "inserted", **options),
                watch("things", "inserted", label="things too", **options),
                watch(OTHER, "inserted", label="other too", **options),
                SENTINEL,
            ],
        )
        thing, no_thing = subscribed(hub, Thing, "inserted")
        thing_too, no_thing_too = subscribed(hub, "things too")
        other, no_other = subscribed(hub, OTHER, "inserted")
        other_too, no_other_too = subscribed(hub, "other too")

        def insert(weird_id: int) -> None:
            db("INSERT INTO things DEFAULT VALUES")
            db('INSERT INTO "0xabcd".other VALUES (%s)', [weird_id])
            sentinel()

        insert(1234)
        assert [ids(r) for r in (thing, thing_too, other, other_too)] == [[3], [3], [1234], [1234]]
        assert other.items[0].key == {"weird_id": 1234}
        no_thing.cancel()
        no_other.cancel()
        insert(2345)
        assert [ids(r) for r in (thing, thing_too)] == [[3], [3, 4]]
        assert [ids(r) for r in (other, other_too)] == [[1234], [1234, 2345]]
        no_thing_too.cancel()
        no_other_too.cancel()
        insert(3456)
        assert [len(r.items) for r in (thing, thing_too, other, other_too)] == [1, 2, 1, 2]

    def test_by_an_association(self, hub: Hub, dsn: str, db: Database, sentinel: Sentinel) -> None:
        """[19] Children of one parent only, for a model and for a label."""
        pair = Pair(hub, dsn, "inserted", CHILDREN, parent_id=2)
        db("INSERT INTO things (parent_id) VALUES (1), (2), (NULL)")
        sentinel()
        assert pair.found == 2 * [[(4, {"parent_id": 2})]]
        pair.end_model.cancel()
        pair.end_label.cancel()
        db("INSERT INTO things (parent_id) VALUES (2)")
        sentinel()
        assert pair.counts == (1, 1)

    def test_without_a_receiver_nothing_is_called(
        self, hub: Hub, dsn: str, db: Database, sentinel: Sentinel
    ) -> None:
        """[22] Events that nobody listens to go nowhere."""
        before = Recorder()
        hub.subscribe(before, Thing).cancel()
        hub.start(dsn, [(Thing, "inserted"), (OTHER, "inserted"), SENTINEL])
        db('INSERT INTO things DEFAULT VALUES; INSERT INTO "0xabcd".other VALUES (1)')
        sentinel()
        assert before.items == []
        assert hub.status().received == 3


@pytest.mark.parametrize("op", ["inserted", "updated", "deleted"])
class TestColumnsThatDoNotTravel:
    @pytest.mark.parametrize(
        ("extra", "asked"),
        [(["parent_id"], "other_id"), ([], "text"), (["text"], "number")],
    )
    def test_a_column_that_is_not_extra(
        self, hub: Hub, dsn: str, op: str, extra: list[str], asked: str
    ) -> None:
        """[20, 27, 28, 36, 37] Asking for records by what events do not carry is refused."""
        hub.start(dsn, [watch(Thing, op, extra=extra)])
        with pytest.raises(ReceiverError, match=rf"asks for {asked}=….*add extra=\['{asked}'\]"):
            subscribed(hub, Thing, op, **{asked: 1})

    def test_a_column_that_is_no_association(
        self, hub: Hub, dsn: str, db: Database, op: str
    ) -> None:
        """[21] Refused there; here any extra column serves to choose records."""
        hub.start(dsn, [watch(Thing, op, extra=["text"])])
        recorder, _ = subscribed(hub, Thing, op, text="b")
        db("INSERT INTO things (text) VALUES ('c'), ('b')")
        db("UPDATE things SET number = 1 WHERE id > 2; DELETE FROM things WHERE id > 2")
        assert recorder.wait(1)[0].id == 4


class TestUpdates:
    def end_one_by_one(
        self, pair: Pair, db: Database, sentinel: Sentinel, *counts: tuple[int, int]
    ) -> None:
        """Update with both receivers, with that of the label, and with none: what each has then."""
        both, label, none = counts
        for end, expected in ((pair.end_model, both), (pair.end_label, label), (None, none)):
            db("UPDATE things SET text = text || '!'")
            sentinel()
            assert pair.counts == expected
            if end is not None:
                end.cancel()

    @pytest.mark.parametrize(
        "options", [{}, {"columns": [], "extra": []}], ids=["default", "empty lists"]
    )
    def test_all(
        self,
        hub: Hub,
        dsn: str,
        db: Database,
        sentinel: Sentinel,
        options: dict[str, Any],
    ) -> None:
        """[23, 24] One event a row, to model and label; each subscription ends by itself."""
        pair = Pair(hub, dsn, "updated", options)
        self.end_one_by_one(pair, db, sentinel, (2, 2), (2, 4), (2, 4))
        assert sorted(ids(pair.model)) == [1, 2]

    def test_by_id(self, hub: Hub, dsn: str, db: Database, sentinel: Sentinel) -> None:
        """[25] Only the record asked for, until the subscription ends."""
        hub.start(dsn, [(Thing, "updated"), SENTINEL])
        recorder, end = subscribed(hub, Thing, "updated", id=1)
        db("UPDATE things SET text = 'x'")
        sentinel()
        assert ids(recorder) == [1]
        end.cancel()
        db("UPDATE things SET text = 'y'")
        sentinel()
        assert ids(recorder) == [1]

    def test_by_an_association(self, hub: Hub, dsn: str, db: Database, sentinel: Sentinel) -> None:
        """[26] Only children of the parent asked for, to model and label, each by itself."""
        pair = Pair(hub, dsn, "updated", CHILDREN, parent_id=1)
        self.end_one_by_one(pair, db, sentinel, (1, 1), (1, 2), (1, 2))
        assert pair.found[0] == [(2, {"parent_id": 1})]

    def test_columns(self, hub: Hub, dsn: str, db: Database, sentinel: Sentinel) -> None:
        """[29] Only changes of these columns, by label and id, whatever the columns are called."""
        hub.start(dsn, [watch(Thing, "updated", columns=["number", "ratio"], label="x"), SENTINEL])
        recorder, end = subscribed(hub, "x", id=1)
        changes = []
        for assignment in ("text = 'c'", "number = 9999", '"theRatio" = 99.999'):
            db(f"UPDATE things SET {assignment}")
            sentinel()
            changes.append(len(recorder.items))
        assert changes == [0, 1, 2]
        assert [(e.id, e.changed) for e in recorder.items] == [(1, {"number"}), (1, {"ratio"})]
        end.cancel()
        db("UPDATE things SET number = 1")
        sentinel()
        assert len(recorder.items) == 2

    def test_extra_columns(self, hub: Hub, dsn: str, db: Database, sentinel: Sentinel) -> None:
        """[30] Current values travel under the model's names, whatever has changed."""
        hub.start(dsn, [watch(Thing, "updated", extra=["number", "ratio"]), SENTINEL])
        recorder, end = subscribed(hub, Thing, "updated", id=1)
        for assignment in ("text = 'c'", "number = 9999", '"theRatio" = 99.999'):
            db(f"UPDATE things SET {assignment}")
        assert [event.values for event in recorder.wait(3)] == [
            {"number": 4455, "ratio": 84.52},
            {"number": 9999, "ratio": 84.52},
            {"number": 9999, "ratio": 99.999},
        ]
        end.cancel()
        db("UPDATE things SET number = 1")
        sentinel()
        assert ids(recorder) == [1, 1, 1]

    @pytest.mark.parametrize("statement", ["UPDATE things SET text = 'c'", "DELETE FROM things"])
    def test_without_a_hub(self, hub: Hub, dsn: str, db: Database, statement: str) -> None:
        """[31, 38] Before start nothing arrives, and it does not arrive later either."""
        recorder, _ = subscribed(hub, Thing)
        db(statement)
        hub.start(dsn, [Thing])
        db("INSERT INTO things DEFAULT VALUES")
        assert [event.op for event in recorder.wait(1)] == ["inserted"]


class TestDeletes:
    @pytest.mark.parametrize("options", [{}, {"extra": []}], ids=["default", "empty extra"])
    def test_all(
        self,
        hub: Hub,
        dsn: str,
        db: Database,
        sentinel: Sentinel,
        options: dict[str, Any],
    ) -> None:
        """[32, 33] One event a row, to model and label; each subscription ends by itself."""
        pair = Pair(hub, dsn, "deleted", options)
        db("DELETE FROM things")
        sentinel()
        assert sorted(ids(pair.model)) == sorted(ids(pair.label)) == [1, 2]
        for end in (pair.end_model, pair.end_label):
            end.cancel()
            db("INSERT INTO things DEFAULT VALUES; DELETE FROM things")
            sentinel()
            assert pair.counts == (2, 3)
        assert pair.label.items[-1].id == 3

    def test_by_id(self, hub: Hub, dsn: str, db: Database, sentinel: Sentinel) -> None:
        """[34] Only the record asked for; nothing once the subscription has ended."""
        hub.start(dsn, [(Thing, "deleted"), SENTINEL])
        recorder, _ = subscribed(hub, Thing, "deleted", id=1)
        ended, end = subscribed(hub, Thing, "deleted", id=3)
        end.cancel()
        db("DELETE FROM things; INSERT INTO things DEFAULT VALUES; DELETE FROM things")
        sentinel()
        assert (ids(recorder), ids(ended)) == ([1], [])

    def test_by_an_association(self, hub: Hub, dsn: str, db: Database, sentinel: Sentinel) -> None:
        """[35] Only former children of the parent asked for, with the value that they had."""
        pair = Pair(hub, dsn, "deleted", CHILDREN, parent_id=1)
        db("DELETE FROM things")
        sentinel()
        assert pair.found == 2 * [[(2, {"parent_id": 1})]]


class TestDetails:
    def test_status_tells_of_watchers_with_and_without_a_label(self, hub: Hub, dsn: str) -> None:
        """[39] Table, operation, label, the name of trigger, function and channel, listeners."""
        hub.start(dsn, [watch(Thing, "updated", label="custom"), (Thing, "deleted")])
        labelled, plain = hub.status().watchers
        assert (labelled.schema, labelled.table, labelled.op) == ("public", "things", "updated")
        assert (labelled.label, plain.label) == ("custom", None)
        assert (labelled.status, labelled.listeners) == ("INSTALLED", 1)
        assert plain.op == "deleted"
        assert labelled.name != plain.name
        assert re.fullmatch(r"pgsignals_[0-9a-f]{16}", plain.name)


class TestLogging:
    WATCHERS = (
        watch(Thing, "updated", extra=["text"], label="first"),
        watch(Thing, "updated", extra=["number"], label="second"),
    )

    def deliver_one(self, hub: Hub, dsn: str, db: Database) -> None:
        """Have one event delivered, to a receiver of the first watcher."""
        hub.start(dsn, self.WATCHERS)
        recorder, _ = subscribed(hub, "first")
        db("UPDATE things SET text = 'c' WHERE id = 1")
        recorder.wait(1)

    def test_each_step_at_debug(
        self, hub: Hub, dsn: str, db: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        """[41] Connecting, listening, installing, subscribing, receiving, delivering."""
        caplog.set_level(logging.DEBUG, "pgsignals")
        self.deliver_one(hub, dsn, db)
        hub.stop()
        name = hub_channel(caplog, "updated of 'first' on Thing")
        for line in (
            rf"connecting to .*{db.connection.info.dbname}",
            rf"listening on {name} for updated of 'first' on Thing",
            r"listening on \w+ for updated of 'second' on Thing",
            rf'installing: CREATE FUNCTION "public"\."{name}"',
            rf'installing: CREATE TRIGGER "{name}" AFTER UPDATE ON "public"\."things"',
            rf"installed trigger {name} for updated on public\.things",
            r"started with 2 watchers",
            r"the receiver \S*Recorder listens to 'first'",
            rf"received \d+ bytes on {name}",
            r"delivering <Event 'first' public\.things updated id=1 text='c'> to 1 receivers",
            r"stopped",
        ):
            assert re.search(line, caplog.text), f"{line} is not in\n{caplog.text}"

    def test_one_watcher_can_be_picked_by_a_filter(
        self, hub: Hub, dsn: str, db: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        """[40] There is no option on a watcher: each line names it, so that a filter can choose."""
        caplog.set_level(logging.DEBUG, "pgsignals")
        self.deliver_one(hub, dsn, db)
        delivered = [r.getMessage() for r in caplog.records if "delivering" in r.getMessage()]
        assert len(delivered) == 1
        assert "'first'" in delivered[0]

    def test_nothing_of_it_at_info(
        self, hub: Hub, dsn: str, db: Database, caplog: pytest.LogCaptureFixture
    ) -> None:
        """[40, 41] At INFO only what was changed in the database is logged."""
        caplog.set_level(logging.INFO, "pgsignals")
        self.deliver_one(hub, dsn, db)
        assert {r.getMessage().split()[0] for r in caplog.records} == {"installed"}


def hub_channel(caplog: pytest.LogCaptureFixture, watcher: str) -> str:
    """The channel that the log says belongs to the watcher."""
    found = re.search(rf"listening on (\w+) for {re.escape(watcher)}", caplog.text)
    assert found, caplog.text
    return found[1]


class TestTriggerCreation:
    def test_one_trigger_on_every_version(self, each_dsn: str, each_db: Database) -> None:
        """[42, 43] On the oldest and the newest version each further start finds the one trigger.

        There the statement that replaces it depends on the version; here nothing is replaced.
        """
        each_db("CREATE TABLE users (id serial PRIMARY KEY)")
        names = []
        for _ in range(3):
            with Hub().start(each_dsn, [("users", "inserted")]):
                names += each_db("SELECT tgname, oid FROM pg_trigger WHERE NOT tgisinternal")
        assert len(names) == 3
        assert len(set(names)) == 1
