"""What happens at an event, and before the first one."""
