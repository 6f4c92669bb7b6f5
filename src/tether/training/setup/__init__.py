"""What happens between a trainer's constructor and its first step: policy, data, reference, put together as a `Run`."""
