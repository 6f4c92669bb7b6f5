"""Where rows come from: objects in memory, files, the hub; read whole or as a stream."""
