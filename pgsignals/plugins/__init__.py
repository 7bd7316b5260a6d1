"""The modules that a plugin's author imports: hooks, brokers' protocols, CloudEvents and URLs."""
