// Shows what the stream tells. Whatever comes from the database is set as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const BASE = location.pathname.replace(/[^/]*$/, "");
const { token, actions, values } = document.body.dataset;
const VIEWS = ["health", "consumers", "dead-letters", "watchers", "events", "backfills"];
const MOST_EVENTS = 300;

// What was told last, by its name.
const told = { rates: {}, history: {}, watchers: [], consumers: [], slots: [], parked: [],
  backfills: [], letters: { total: 0, consumers: {}, latest: [] }, findings: { checks: [] } };

// --- Elements ------------------------------------------------------------------------------------

function make(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "onclick" || name === "onchange") made[name] = value;
    else if (name === "text") made.textContent = value;
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

const second = (text) => make("span", { class: "second", text });
const badge = (text, kind) => make("span", { class: `badge ${kind}`, text });
const plain = (text, onclick, label) =>
  make("button", { type: "button", class: "plain", text, onclick, "aria-label": label });

// Shows items in a table's body. A cell is made anew only when what it shows has changed, so that
// what somebody has focused or selected stays.
function fill(id, items, keyOf, cellsOf, empty) {
  const table = $(`t-${id}`);
  const body = table.tBodies[0];
  const labels = [...table.tHead.rows[0].cells].map((cell) => [cell.textContent, cell.className]);
  const old = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  let before = body.firstElementChild;
  for (const item of items) {
    const key = String(keyOf(item));
    let row = old.get(key);
    if (row === undefined) {
      row = make("tr", { role: "row", "data-key": key });
      for (const [label, kind] of labels) {
        row.append(make("td", { role: "cell", "data-label": label, class: kind || null }));
      }
    }
    old.delete(key);
    cellsOf(item).forEach(([sign, build, kind], index) => {
      const cell = row.cells[index];
      const known = JSON.stringify(sign);
      if (cell._sign === known) return;
      cell._sign = known;
      const content = build === undefined ? sign : build();
      const parts = (Array.isArray(content) ? content : [content]).filter(Boolean);
      // One child, so that a telephone can put the column's name beside it.
      cell.replaceChildren(...(parts.length ? [make("div", {}, ...parts)] : []));
      // A word is broken only where it would make the table too wide.
      const long = /\S{25}/.test(cell.firstElementChild?.innerText ?? "");
      cell.className = [labels[index][1], kind, parts.length ? "" : "nothing", long ? "long" : ""]
        .filter(Boolean).join(" ");
    });
    if (row === before) before = before.nextElementSibling;
    else body.insertBefore(row, before);
  }
  for (const row of old.values()) row.remove();
  const none = table.nextElementSibling;
  none.textContent = empty;
  none.hidden = items.length > 0;
  table.hidden = items.length === 0;
}

// --- Texts ---------------------------------------------------------------------------------------

const whole = new Intl.NumberFormat("en");

function age(seconds) {
  seconds = Math.max(0, seconds);
  if (seconds < 100) return `${Math.round(seconds)} s`;
  if (seconds < 6000) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

function size(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit < 4) { bytes /= 1024; unit += 1; }
  const digits = unit && bytes < 100 ? 1 : 0;
  return `${bytes.toFixed(digits)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

const since = (time) => {
  const now = told.state ? Date.parse(told.state.at) : Date.now();
  return age((now - Date.parse(time)) / 1000);
};
function clock(time) {
  const at = new Date(time);
  const two = (number) => String(number).padStart(2, "0");
  return `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}.${String(at.getMilliseconds()).padStart(3, "0")}`;
}

const count = (number, noun) => `${whole.format(number)} ${noun}${number === 1 ? "" : "s"}`;

// --- Views ---------------------------------------------------------------------------------------

function show() {
  const asked = location.hash.slice(1);
  const view = VIEWS.includes(asked) ? asked : "health";
  for (const each of VIEWS) $(each).hidden = each !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) {
      link.setAttribute("aria-current", "page");
      const nav = link.parentElement;
      nav.scrollLeft = link.offsetLeft - nav.offsetLeft - (nav.clientWidth - link.clientWidth) / 2;
    } else link.removeAttribute("aria-current");
  }
  entitle();
}

function entitle() {
  const view = document.querySelector("nav a[aria-current]").firstChild.textContent.trim();
  document.title = `${view} · ${told.state?.database || "pgsignals"}`;
}

function mark(id, number, kind) {
  const found = $(id);
  found.textContent = whole.format(number);
  found.className = `badge ${kind}`;
  found.hidden = !number;
}

const flags = (watcher) => [
  watcher.detail,
  watcher.twins.length ? `${watcher.twins.length + 1} do the same on this table` : "",
].filter(Boolean);

const LEVELS = { INSTALLED: ["in use", "ok"], STALE: ["nobody listens", "warn"], OUTDATED: ["broken", "fail"] };

const paint = {
  state(state) {
    $("where").textContent = state.database
      ? `${state.database} at ${state.host} as ${state.user} · ${state.server}` : "";
    $("problem").hidden = !state.problem;
    $("problem").textContent = state.problem;
    connection();
    figures();
    entitle();
    // Ages grow though nothing else has changed.
    paintLetters();
    paint.backfills(told.backfills);
    paint.parked(told.parked);
  },
  watchers(watchers) {
    const flagged = watchers.filter((each) => flags(each).length);
    mark("n-watchers", flagged.length, watchers.some((each) => each.status === "OUTDATED") ? "fail" : "warn");
    $("unheard").hidden = !watchers.some((each) => each.delivery === "wal");
    const text = $("watchers-filter").value.trim().toLowerCase();
    const shown = watchers.filter((each) => (!$("watchers-flagged").checked || flags(each).length)
      && [each.schema, each.table, each.op, each.label, each.namespace, each.delivery, each.owner]
        .join(" ").toLowerCase().includes(text));
    const rank = { OUTDATED: 0, STALE: 1, INSTALLED: 2 };
    shown.sort((a, b) => rank[a.status] - rank[b.status]);
    fill("watchers", shown, (each) => each.name, (each) => {
      const [state, kind] = LEVELS[each.status] || [each.status, "warn"];
      const rate = told.rates[each.name];
      const twins = each.twins.map((name) => watchers.find((other) => other.name === name))
        .filter(Boolean).map((other) => `namespace ${other.namespace}`);
      return [
        [`${each.schema}.${each.table ?? "—"}`, undefined, "name bare"],
        [[each.op, each.label], () => [each.op, each.label && second(each.label)]],
        [[state, each.detail, twins, each.listeners, each.consumers], () => [
          badge(state, kind),
          ...(each.detail && each.detail !== state ? [make("span", { class: "flag", text: each.detail })] : []),
          ...(twins.length ? [make("span", { class: "flag", text: `does the same as ${twins.join(", ")}` })] : []),
          second([each.listeners ? count(each.listeners, "listener") : "", ...each.consumers].filter(Boolean).join(", ")),
        ]],
        [[each.delivery, each.served], () => [each.delivery, each.served && second(`by ${each.served}`)]],
        [each.namespace],
        [each.owner],
        [rate === undefined ? "" : rate.toFixed(1)],
        [[each.columns, each.condition], () => [
          each.columns.join(", "), " ",
          each.condition && make("code", { text: each.condition }), " ",
          plain("SQL", () => definition(each), `SQL of ${each.op} on ${each.table}`),
        ]],
      ];
    }, watchers.length ? "None of them fits." : "Nothing of pgsignals is installed in this database.");
    figures();
  },
  rates() { paint.watchers(told.watchers); },
  consumers(consumers) {
    const named = consumers.filter((each) => !each.ephemeral);
    const held = named.filter((each) => each.reason);
    mark("n-consumers", held.length, "warn");
    fill("consumers", consumers, (each) => each.key, (each) => {
      const lag = each.lag === null ? "" : `${whole.format(each.lag)}${each.counted ? "" : "+"}`;
      return [
        [[each.key, each.kind, each.delivery], () => [each.key, second(`${each.kind}, ${each.delivery}`)], "name bare"],
        [[each.active, each.host, each.pid], () => each.active
          ? [badge("active", "ok"), second(`${each.host}, pid ${each.pid}`)]
          : [badge(each.ephemeral ? "idle" : "nobody reads", each.ephemeral ? "" : "warn"),
            each.host && second(`last ${each.host}, pid ${each.pid}`)]],
        [lag], [size(each.lag_bytes)], [age(each.lag_seconds)],
        [[told.history[each.key], $("measure").value], () => spark(each.key)],
        [each.dead_letters ? whole.format(each.dead_letters) : ""],
        [each.reason],
      ];
    }, "There are no consumers: nothing is delivered durably in this database.");
    figures();
  },
  history() { paint.consumers(told.consumers); },
  slots(slots) {
    fill("slots", slots, (each) => each.name, (each) => [
      [each.name, undefined, "name bare"],
      [[each.invalidation, each.active, each.begins], () => each.invalidation
        ? badge(`given up: ${each.invalidation}`, "fail")
        : each.begins === null ? badge("being made", "warn")
        : badge(each.active ? "read" : "nobody reads", each.active ? "ok" : "warn")],
      [size(each.retained_bytes)],
      [each.safe_bytes === null ? "no bound" : size(Math.max(0, each.safe_bytes))],
      [each.safe_seconds === null ? "kept" : `given up in ${age(each.safe_seconds)}`],
    ], "The server keeps no WAL for pgsignals.");
    figures();
  },
  parked(parked) {
    $("parked-part").hidden = !parked.length;
    fill("parked", parked, (each) => `${each.consumer} ${each.receiver}`, (each) => [
      [each.consumer, undefined, "name bare"], [each.receiver], [whole.format(each.events)], [since(each.since)],
    ], "");
  },
  letters(letters) {
    mark("n-letters", letters.total, "fail");
    const select = $("letters-consumer");
    const wanted = ["", ...Object.keys(letters.consumers).sort()];
    if (!wanted.includes(select.value)) wanted.push(select.value);
    if (wanted.join("\n") !== [...select.options].map((each) => each.value).join("\n")) {
      const chosen = select.value;
      select.replaceChildren(...wanted.map((name) => make("option", { value: name, text: name || "all" })));
      select.value = chosen;
    }
    refreshLetters();
    figures();
  },
  backfills(backfills) {
    const running = backfills.filter((each) => each.state === "running");
    mark("n-backfills", running.length, "");
    fill("backfills", backfills, (each) => each.id, (each) => {
      const share = each.total ? Math.min(1, each.done / each.total) : 1;
      const kind = { done: "ok", failed: "fail", cancelled: "warn" }[each.state] || "";
      const target = each.label ?? `${each.schema}.${each.table}`;
      return [
        [[target, each.condition], () => [target, each.condition && make("code", { text: each.condition })], "name bare"],
        [each.consumer],
        [each.state, () => badge(each.state, kind)],
        [share, () => [make("progress", { max: "1", value: share, "aria-label": `${target} is ${Math.round(share * 100)}% done` }),
          second(`${Math.round(share * 100)}%`)]],
        [`${whole.format(each.done)} of ${whole.format(each.total)}`],
        [since(each.started_at)],
        [each.error || `${whole.format(each.delivered)} delivered`],
      ];
    }, "No backfill was asked for in the last days.");
    figures();
  },
  findings(findings) {
    const found = findings.checks;
    const bad = found.filter((each) => each.level !== "ok");
    mark("n-health", bad.length, bad.some((each) => each.level === "fail") ? "fail" : "warn");
    const rank = { fail: 0, warn: 1, ok: 2 };
    $("findings").replaceChildren(...[...found].sort((a, b) => rank[a.level] - rank[b.level]).map((each) => make("li", {},
      badge(each.level, each.level),
      make("span", {}, make("strong", { text: `${each.check}: ` }), each.message),
      each.fix ? make("div", { class: "fix" }, make("code", { text: each.fix }),
        make("button", { type: "button", text: "Copy", "aria-label": `Copy the fix of ${each.check}`,
          onclick: (event) => copy(commands(each.fix), event.target) })) : null)));
    $("findings").hidden = !found.length;
    figures();
  },
  events(events) {
    for (const event of events) event.number = told.number = (told.number || 0) + 1;
    told.heard = [...events.reverse(), ...(told.heard || [])].slice(0, MOST_EVENTS);
    if ($("pause").getAttribute("aria-pressed") === "false") paintEvents();
    else $("events-count").textContent = "Paused; new ones are kept.";
  },
};

function figures() {
  const stale = told.watchers.filter((each) => each.status === "STALE").length;
  const broken = told.watchers.filter((each) => each.status === "OUTDATED").length;
  const named = told.consumers.filter((each) => !each.ephemeral);
  const alone = named.filter((each) => !each.active).length;
  const behind = named.reduce((most, each) => (each.lag_seconds > (most?.lag_seconds ?? 0) ? each : most), null);
  const kept = told.slots.reduce((sum, each) => sum + each.retained_bytes, 0);
  const usage = told.state?.queue_usage ?? 0;
  const running = told.backfills.filter((each) => each.state === "running").length;
  const rows = [
    ["Watchers", whole.format(told.watchers.length),
      [broken && `${broken} broken`, stale && `${stale} that nobody listens to`].filter(Boolean).join(", "), broken ? "failed" : stale ? "warned" : ""],
    ["Consumers and backends", whole.format(named.length), alone ? `${alone} that nobody reads` : "", alone ? "warned" : ""],
    ["Furthest behind", behind ? age(behind.lag_seconds) : "0 s", behind?.key ?? "", behind?.lag_seconds > 60 ? "warned" : ""],
    ["Dead letters", whole.format(told.letters.total), Object.keys(told.letters.consumers).join(", "), told.letters.total ? "failed" : ""],
    ["Notification queue", `${Math.round(usage * 100)}%`, "of the server's", usage >= 0.1 ? "warned" : ""],
    ["Outbox", told.state?.outbox ? size(told.state.outbox.bytes) : "none", told.state?.outbox?.shed ? "events were left out" : "", told.state?.outbox?.shed ? "failed" : ""],
    ["WAL kept", told.slots.length ? size(kept) : "none", told.slots.length ? `for ${count(told.slots.length, "slot")}` : "", ""],
    ["Backfills", whole.format(running), "running", ""],
  ];
  const list = $("figures");
  rows.forEach(([name, value, more, kind], index) => {
    let part = list.children[index];
    if (part === undefined) {
      part = make("div", {}, make("dt", { text: name }), make("dd"), make("dd", { class: "more" }));
      list.append(part);
    }
    if (part.children[1].textContent !== value) part.children[1].textContent = value;
    if (part.children[2].textContent !== more) part.children[2].textContent = more;
    part.className = kind;
  });
  if (told.findings.at) {
    $("checked").textContent = told.findings.checks.length ? `checked ${since(told.findings.at)} ago` : "";
  }
}

function spark(key) {
  const measure = { events: 1, bytes: 2, seconds: 3 }[$("measure").value];
  const points = (told.history[key] || []).filter((each) => each[measure] !== null);
  const most = Math.max(0, ...points.map((each) => each[measure]));
  const scale = Math.max(most, { 1: 1, 2: 1024, 3: 1 }[measure]);
  const text = !points.length ? "not known" : { 1: count(most, "event"), 2: size(most), 3: age(most) }[measure];
  const drawing = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  drawing.setAttribute("class", "spark");
  drawing.setAttribute("viewBox", "0 0 120 30");
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", `At most ${text} behind in the last hour`);
  if (points.length) {
    const at = points.map((each) => [119 - each[0], 28 - (26 * each[measure]) / scale]);
    if (at.length === 1) at.unshift([at[0][0] - 1, at[0][1]]);
    const line = at.map(([x, y]) => `${x} ${y.toFixed(1)}`).join(" L ");
    for (const [kind, path] of [["area", `M ${at[0][0]} 29 L ${line} L ${at.at(-1)[0]} 29 Z`], ["line", `M ${line}`]]) {
      const drawn = document.createElementNS("http://www.w3.org/2000/svg", "path");
      drawn.setAttribute("class", kind);
      drawn.setAttribute("d", path);
      drawing.append(drawn);
    }
  }
  return [drawing, second(points.length ? `at most ${text}` : text)];
}

function paintEvents() {
  const text = $("events-filter").value.trim().toLowerCase();
  const heard = told.heard || [];
  const shown = heard.filter((each) => [each.table, each.op, each.label, each.record, each.namespace, each.delivery, each.values]
    .join(" ").toLowerCase().includes(text)).slice(0, 200);
  $("events-count").textContent = heard.length ? `${shown.length} of the latest ${heard.length}` : "";
  fill("events", shown, (each) => each.number, (each) => [
    [each.at, () => [make("span", { class: "code", text: clock(each.at) })]],
    [each.table, undefined, "name bare"],
    [[each.op, each.label], () => [each.op, each.label && second(each.label)]],
    [[each.record, each.note], () => [each.record, each.note && make("span", { class: "flag", text: each.note })]],
    ...(values ? [[each.values]] : []),
    [each.delivery], [each.namespace],
  ], heard.length ? "None of them fits." : "Nothing has happened since the console looks.");
}

// --- Dead letters --------------------------------------------------------------------------------

const chosen = new Set();
let older = [];
let first = [];
let asking = 0;

async function refreshLetters() {
  const consumer = $("letters-consumer").value;
  if (!consumer) {
    first = told.letters.latest;
  } else {
    const asked = (asking += 1);
    const found = await ask(`dead-letters?consumer=${encodeURIComponent(consumer)}`);
    if (found === null || asked !== asking) return;
    first = found.letters;
  }
  paintLetters();
}

function paintLetters() {
  const consumer = $("letters-consumer").value;
  const total = consumer ? told.letters.consumers[consumer] || 0 : told.letters.total;
  const last = first.length ? first.at(-1).id : Infinity;
  const shown = [...first, ...older.filter((each) => each.id < last)];
  const there = new Set(shown.map((each) => each.id));
  for (const id of chosen) if (!there.has(id)) chosen.delete(id);
  $("letters-count").textContent = total ? `${whole.format(Math.min(shown.length, total))} of ${whole.format(total)}` : "";
  $("older").hidden = shown.length >= total;
  fill("letters", shown, (each) => each.id, (each) => {
    const record = [each.table || "a backfill", each.op].filter(Boolean).join(" ");
    return [
      ...(actions ? [[each.id, () => [make("label", {}, make("input", { type: "checkbox", "aria-label": `Choose dead letter ${each.id}`,
        onchange: (event) => { event.target.checked ? chosen.add(each.id) : chosen.delete(each.id); buttons(); } }))], "bare"]] : []),
      [[record, each.record, each.retrying], () => [
        plain(record, () => letter(each.id), `Dead letter ${each.id}: ${record} ${each.record}`),
        each.record && second(each.record), each.retrying && badge("to be retried", "warn")], "bare"],
      [each.receiver], [each.consumer], [each.error.split("\n")[0]],
      [String(each.attempts)], [since(each.at)],
    ];
  }, "There are no dead letters.");
  if (actions) {
    for (const box of document.querySelectorAll("#t-letters input[type=checkbox]")) {
      box.checked = chosen.has(Number(box.closest("tr").dataset.key));
    }
  }
  buttons();
}

function buttons() {
  if (!actions) return;
  $("retry").disabled = $("drop").disabled = !chosen.size;
  $("retry").textContent = chosen.size ? `Retry ${chosen.size}` : "Retry";
  $("drop").textContent = chosen.size ? `Drop ${chosen.size}…` : "Drop…";
}

async function letter(id) {
  const found = await ask(`dead-letters/${id}`);
  if (found === null) return;
  const texts = [["What it raised", found.traceback]];
  if (found.values) texts.push(["What the row holds", JSON.stringify(JSON.parse(found.values), null, 2)]);
  detail(`Dead letter ${id}`, [
    ["Record", [found.table || "a backfill", found.op, found.record].join(" ")],
    ["Receiver", found.receiver], ["Consumer", found.consumer], ["Error", found.error],
    ["Tries", String(found.attempts)], ["Since", `${new Date(found.at).toLocaleString()} (${since(found.at)})`],
    ["Event", found.uid],
  ], texts, id);
}

async function definition(watcher) {
  const found = await ask(`watchers/${watcher.name}`);
  if (found === null) return;
  detail(`${watcher.op} on ${watcher.schema}.${watcher.table}`, [
    ["Name", watcher.name], ["Owner", watcher.owner], ["Columns", watcher.columns.join(", ")],
  ], [["SQL", found.sql]], null);
}

function detail(title, fields, texts, id) {
  $("detail-title").textContent = title;
  $("detail-fields").replaceChildren(...fields.flatMap(([name, text]) => [make("dt", { text: name }), make("dd", { text })]));
  $("detail-texts").replaceChildren(...texts.map(([label, text]) =>
    make("pre", { tabindex: "0", role: "region", "aria-label": label, text })));
  if (actions) {
    $("detail-actions").hidden = id === null;
    $("detail-retry").onclick = () => { $("detail").close(); act("retry", [id]); };
    $("detail-drop").onclick = () => { $("detail").close(); sure([id]); };
  }
  $("detail").showModal();
}

function sure(ids) {
  $("sure-title").textContent = `Drop ${count(ids.length, "dead letter")}?`;
  $("sure-yes").onclick = () => { $("sure").close(); act("drop", ids); };
  $("sure").showModal();
}

async function act(what, ids) {
  const body = new URLSearchParams({ token });
  for (const id of ids) body.append("id", id);
  const found = await ask(`dead-letters/${what}`, { method: "POST", body });
  if (found === null) return;
  for (const id of ids) chosen.delete(id);
  older = older.filter((each) => what !== "drop" || !ids.includes(each.id));
  say(what === "retry"
    ? `${count(found.count, "dead letter")} will be delivered again by the consumer's process.`
    : `${count(found.count, "dead letter")} dropped.`);
  buttons();
}

// --- Asking --------------------------------------------------------------------------------------

async function ask(path, options) {
  try {
    const response = await fetch(BASE + path, options);
    const found = await response.json();
    if (response.ok) return found;
    say(found.error || response.statusText, true);
  } catch (error) {
    say("The console does not answer.", true);
  }
  return null;
}

let silence;
function say(text, bad = false) {
  const place = $("told");
  place.textContent = text;
  place.classList.toggle("good", !bad);
  place.hidden = false;
  clearTimeout(silence);
  silence = setTimeout(() => { place.hidden = true; }, 8000);
}

// What is to be typed stands between backquotes; without any, all of it.
const commands = (fix) => fix.match(/`[^`]+`/g)?.map((each) => each.slice(1, -1)).join("\n") ?? fix;

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch (error) {
    // Without a secure context there is no clipboard: select it, for Ctrl-C.
    getSelection().selectAllChildren(button.previousElementSibling);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

// --- The stream ----------------------------------------------------------------------------------

let source = null;
let open = false;

function connection() {
  const place = $("live");
  const [state, text] = !open ? ["lost", "Reconnecting"]
    : told.state && !told.state.connected ? ["lost", "No database"]
    : told.state ? ["live", "Live"] : ["waiting", "Connecting"];
  if (place.dataset.state !== state) {
    place.dataset.state = state;
    place.textContent = text;
  }
}

function connect() {
  if (source !== null || document.hidden) return;
  source = new EventSource(`${BASE}stream`);
  source.onopen = () => { open = true; told.heard = []; connection(); };
  source.onerror = () => { open = false; connection(); };
  for (const name of Object.keys(paint)) {
    source.addEventListener(name, (event) => {
      const data = JSON.parse(event.data);
      if (name !== "events") told[name] = data;
      paint[name](data);
    });
  }
}

// A tab that nobody sees takes no connection, of which a browser has six for a host.
document.addEventListener("visibilitychange", () => {
  if (document.hidden && source !== null) {
    source.close();
    source = null;
    open = false;
  } else connect();
});

addEventListener("hashchange", show);
for (const id of ["watchers-filter", "watchers-flagged"]) $(id).addEventListener("input", () => paint.watchers(told.watchers));
$("events-filter").addEventListener("input", paintEvents);
$("measure").addEventListener("change", () => paint.consumers(told.consumers));
$("letters-consumer").addEventListener("change", () => { older = []; chosen.clear(); refreshLetters(); });
$("pause").addEventListener("click", () => {
  const paused = $("pause").getAttribute("aria-pressed") === "true";
  $("pause").setAttribute("aria-pressed", String(!paused));
  $("pause").textContent = paused ? "Pause" : "Go on";
  if (paused) paintEvents();
});
$("older").addEventListener("click", async () => {
  const last = [...first, ...older].reduce((least, each) => Math.min(least, each.id), Infinity);
  const consumer = $("letters-consumer").value;
  const found = await ask(`dead-letters?before=${last}&consumer=${encodeURIComponent(consumer)}`);
  if (found !== null) { older.push(...found.letters); paintLetters(); }
});
$("check").addEventListener("click", async () => {
  const found = await ask("check", { method: "POST", body: new URLSearchParams({ token }) });
  if (found !== null) say(found.done);
});
$("detail-close").addEventListener("click", () => $("detail").close());
if (actions) {
  $("retry").addEventListener("click", () => act("retry", [...chosen]));
  $("drop").addEventListener("click", () => sure([...chosen]));
  $("sure-no").addEventListener("click", () => $("sure").close());
}
paintEvents();
show();
connect();
