"""A small shop: its tables, and a writer that behaves as its staff and customers do."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial

import psycopg2
from psycopg2.extensions import cursor as Cursor

TABLES = """
CREATE TABLE customers (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name   text NOT NULL
);
CREATE TABLE products (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name   text NOT NULL,
    price  numeric(8, 2) NOT NULL,
    stock  int NOT NULL CHECK (stock >= 0)
);
CREATE TABLE orders (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer_id  bigint NOT NULL REFERENCES customers,
    status       text NOT NULL DEFAULT 'new',
    total        numeric(10, 2) NOT NULL
);
CREATE TABLE order_items (
    order_id    bigint REFERENCES orders ON DELETE CASCADE,
    product_id  bigint REFERENCES products,
    quantity    int NOT NULL,
    PRIMARY KEY (order_id, product_id)
);
INSERT INTO customers (name) VALUES ('Ada'), ('Grace'), ('Edsger');
INSERT INTO products (name, price, stock) VALUES
    ('teapot', 24.90, 12), ('cup', 4.50, 40), ('saucer', 3.20, 40), ('kettle', 39.00, 6),
    ('assam', 7.80, 30), ('sencha', 9.40, 30), ('strainer', 5.60, 15), ('tin', 6.10, 20);
"""

_NAMES = ("Barbara", "Donald", "Frances", "Ken", "Margaret", "Niklaus", "Radia", "Tony")
_PAUSE = (0.02, 0.25)


class _NoSale(Exception):
    """The transaction that was begun is to be undone."""


class Shop:
    """A day in the shop, the same for the same ``seed`` as long as nobody else writes."""

    def __init__(self, dsn: str, seed: int) -> None:
        self._dsn = dsn
        self._random = random.Random(seed)
        self.rolled_back = 0

    def create_tables(self) -> None:
        """Create the shop's tables in an empty database."""
        connection = psycopg2.connect(self._dsn)
        with closing(connection), connection, connection.cursor() as cursor:
            cursor.execute(TABLES)

    def do_business(self, closed: threading.Event) -> None:
        """Do one thing after the other, each in a transaction of its own, until ``closed``."""
        actions: dict[Callable[[Cursor], object], int] = {
            self._take_order: 16,
            self._change_mind: 3,
            partial(self._move, "new", "paid"): 12,
            partial(self._move, "paid", "shipped"): 10,
            partial(self._move, "new", "cancelled"): 2,
            self._restock: 4,
            self._welcome: 2,
            self._change_prices: 1,
            self._clear_away: 1,
        }
        with closing(psycopg2.connect(self._dsn)) as connection:
            while not closed.wait(self._random.uniform(*_PAUSE)):
                [action] = self._random.choices(list(actions), list(actions.values()))
                try:
                    with connection, connection.cursor() as cursor:
                        action(cursor)
                except (_NoSale, psycopg2.errors.CheckViolation):
                    # The customer went away, or there was not enough in stock.
                    self.rolled_back += 1

    def _take_order(self, cursor: Cursor) -> None:
        cursor.execute("SELECT id FROM customers ORDER BY id")
        customer = self._random.choice(cursor.fetchall())
        cursor.execute("SELECT id, price FROM products ORDER BY id")
        basket = [
            (product, price, self._random.randint(1, 3))
            for product, price in self._random.sample(cursor.fetchall(), self._random.randint(1, 3))
        ]
        cursor.execute(
            "INSERT INTO orders (customer_id, total) VALUES (%s, %s) RETURNING id",
            (customer, sum(price * quantity for _, price, quantity in basket)),
        )
        order = cursor.fetchone()
        for product, _, quantity in basket:
            cursor.execute(
                "INSERT INTO order_items (order_id, product_id, quantity) VALUES (%s, %s, %s)",
                (order, product, quantity),
            )
            cursor.execute(
                "UPDATE products SET stock = stock - %s WHERE id = %s", (quantity, product)
            )

    def _change_mind(self, cursor: Cursor) -> None:
        self._take_order(cursor)
        raise _NoSale

    def _move(self, before: str, after: str, cursor: Cursor) -> None:
        cursor.execute(
            "UPDATE orders SET status = %s WHERE id ="
            " (SELECT id FROM orders WHERE status = %s ORDER BY id LIMIT 1)",
            (after, before),
        )

    def _restock(self, cursor: Cursor) -> None:
        cursor.execute(
            "UPDATE products SET stock = stock + 12 WHERE id ="
            " (SELECT id FROM products ORDER BY stock, id LIMIT 1)"
        )

    def _welcome(self, cursor: Cursor) -> None:
        cursor.execute("INSERT INTO customers (name) VALUES (%s)", (self._random.choice(_NAMES),))

    def _change_prices(self, cursor: Cursor) -> None:
        factor = self._random.choice(("0.95", "1.05"))
        cursor.execute("UPDATE products SET price = price * %s", (factor,))

    def _clear_away(self, cursor: Cursor) -> None:
        cursor.execute("DELETE FROM orders WHERE status = 'cancelled'")
