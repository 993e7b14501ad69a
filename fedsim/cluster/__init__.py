"""Ray clusters: starts, describes and ends them, and says how to connect.

`installed` guards the entry to everything here, `state` remembers what was started, `local` starts
and ends a head on this machine, `launcher` wraps Ray's own launcher for other machines, `probe`
asks a cluster what it has, and `connect` is what the engine needs. Ray is an extra: it is imported
in processes of their own, never by the command.
"""
