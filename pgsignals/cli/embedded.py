"""Our commands in a framework's command line, which gives them the application's options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pgsignals.hub.options import Options

# Commands that an application has no use for.
_NOT_OF_AN_APPLICATION = frozenset({"demo", "plugins"})


# Parameters that the application's options give in place of the command line.
_FROM_APPLICATION: dict[str, Callable[[Options, dict[str, Any]], object]] = {
    "dsn": lambda options, _: options.dsn,
    "namespace": lambda options, _: options.namespace,
    "delivery": lambda options, _: options.transport,
    "capture": lambda options, _: options.capture,
    "allow_unbounded_wal": lambda options, _: options.allow_unbounded_wal,
    "install": lambda options, _: options.install,
    # Without WATCH arguments, all that the application watches.
    "app": lambda options, given: () if given.get("watched") else options.watchers,
}


def commands_for(
    main: click.Group, application: Callable[[], Options], program: str
) -> dict[str, click.Command]:
    """Return ``main``'s commands for an application, by name; users call them by ``program``."""
    with click.Context(main) as ctx:
        found = {name: main.get_command(ctx, name) for name in main.list_commands(ctx)}
    return {
        name: _for_application(command, application, program)
        for name, command in found.items()
        if command is not None and name not in _NOT_OF_AN_APPLICATION
    }


def _for_application(
    command: click.Command, application: Callable[[], Options], program: str
) -> click.Command:
    call = command.callback
    assert call is not None
    taken = [each.name for each in command.params if each.name in _FROM_APPLICATION]

    def callback(**given: Any) -> Any:
        if not taken:
            return call(**given)
        known = application()
        return call(**given, **{name: _FROM_APPLICATION[name](known, given) for name in taken})

    common: dict[str, Any] = {
        "params": [each for each in command.params if each.name not in _FROM_APPLICATION],
        "callback": callback,
        "help": command.help,
        "epilog": _examples(command.epilog, program),
        "context_settings": command.context_settings,
    }
    if isinstance(command, click.Group):
        return click.Group(
            command.name,
            commands=[
                _for_application(each, application, program) for each in command.commands.values()
            ],
            invoke_without_command=command.invoke_without_command,
            **common,
        )
    return click.Command(command.name, no_args_is_help=command.no_args_is_help, **common)


def _examples(epilog: str | None, program: str) -> str | None:
    """Return the examples that have none of the options that the application gives."""
    if epilog is None:
        return None
    lines = [
        line.replace("pgsignals ", f"{program} ", 1) if line.startswith("  pgsignals ") else line
        for line in epilog.splitlines()
        if not any(f"--{name.replace('_', '-')}" in line for name in _FROM_APPLICATION)
    ]
    return "\n".join(lines) if any(line.startswith(f"  {program} ") for line in lines) else None
