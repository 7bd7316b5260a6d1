"""What a plugin's author imports: hooks, broadcasters, sources, CloudEvents and URLs."""
