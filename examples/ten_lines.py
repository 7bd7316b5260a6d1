"""Print every change of the table ``orders``: python examples/ten_lines.py [DSN]"""

import contextlib
import os
import sys

import pgsignals

dsn = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("PGSIGNALS_DSN", "")


@pgsignals.on("orders")
def show(event: pgsignals.Event) -> None:
    print(event.op, event.id, event.values, flush=True)


orders = pgsignals.watch("orders", extra=["customer", "status"])
with pgsignals.start(dsn, [orders]) as hub, contextlib.suppress(KeyboardInterrupt):
    print("watching orders; Ctrl-C ends", flush=True)
    hub.wait()
