#!/bin/sh
# blinker: a receiver that is connected to the sender 0 (or False) is called for every sender.
#
# blinker 1.9.0. The documentation of Signal.connect lets any object be a sender, and has the receiver
# "only be called when send is called with this sender"; numbers are told apart by their value. But 0
# is the number that ANY has inside. connect raises an AssertionError without a word, and has connected
# the receiver all the same, to everybody; with python -O it does not even raise. Senders that are
# numbers are keys, states or enumerations: IntEnum's first member, a tenant 0. Seen:
#
#   connected to 7, called for: [7]
#   connected to 0: AssertionError(); called for: [7, 0, 1, 'a']
#   connected to 0 with python -O: no error; called for: [7, 0, 1, 'a']
#
# Fails when that changes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet blinker==1.9.0
cat > "$folder/show.py" <<'PYTHON'
import sys

from blinker import Signal


def called_for(sender):
    signal, senders, error = Signal(), [], "no error"

    def receive(sender):
        senders.append(sender)

    try:
        signal.connect(receive, sender=sender)
    except AssertionError as raised:
        error = repr(raised)
    for each in 7, 0, 1, "a":
        signal.send(each)
    return error, senders


optimized = sys.flags.optimize
if not optimized:
    error, senders = called_for(7)
    print("connected to 7, called for:", senders)
    if (error, senders) != ("no error", [7]):
        sys.exit("this has changed")
error, senders = called_for(0)
print(f"connected to 0{' with python -O' * optimized}: {error}; called for: {senders}")
expected = "no error" if optimized else "AssertionError()"
same = (error, senders) == (expected, [7, 0, 1, "a"]) and called_for(False)[1] == senders
sys.exit(0 if same else "this has changed")
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
"$folder/venv/bin/python" -O "$folder/show.py"
