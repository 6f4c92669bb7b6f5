"""How a reference is computed: the policy without its adapter, a snapshot, another model, a server."""
