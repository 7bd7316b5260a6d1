"""Values and rules that every layer shares. Nothing here talks to a server."""
