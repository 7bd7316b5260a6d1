"""E-mail a user whose address was changed: python email_on_update.py [DSN]

The mail server is SMTP_HOST (localhost) at SMTP_PORT (25).
"""

from __future__ import annotations

import logging
import os
import smtplib
import sys
from contextlib import suppress
from email.message import EmailMessage

import pgsignals

SENDER = "shop@example.org"


def compose(event: pgsignals.Event) -> EmailMessage:
    """The mail that tells of a changed address."""
    old, new = event.old["email"], event.values["email"]
    mail = EmailMessage()
    mail["From"] = SENDER
    mail["To"] = [old, new]
    mail["Subject"] = "Your e-mail address was changed"
    # The uid names the event, so that a mail that is sent twice can be told from two changes.
    mail["Message-ID"] = f"<{event.uid}@example.org>"
    mail.set_content(
        f"Dear {event.values['name']},\n\n"
        f"your address was changed from {old} to {new} on {event.at:%d %B %Y at %H:%M %Z}.\n"
        "If that was not you, please answer this mail.\n"
    )
    return mail


def main() -> None:
    logging.basicConfig()
    dsn = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("PGSIGNALS_DSN", "")
    host, port = os.environ.get("SMTP_HOST", "localhost"), int(os.environ.get("SMTP_PORT", "25"))

    @pgsignals.on("email_changed")
    def send(event: pgsignals.Event) -> None:
        if event.truncated:  # The values were too long to travel, so this is no address.
            return
        with smtplib.SMTP(host, port, timeout=10) as server:
            server.send_message(compose(event))
        print(f"told user {event.id}", flush=True)

    changed = pgsignals.watch(
        "users", "updated", columns=["email"], extra=["name"], label="email_changed"
    )
    with pgsignals.start(dsn, [changed]) as hub, suppress(KeyboardInterrupt):
        print("watching the users' addresses; Ctrl-C ends", flush=True)
        hub.wait()


if __name__ == "__main__":
    main()
