"""What the keys of each tool become: rules that `convert` applies, one file or some a tool."""
