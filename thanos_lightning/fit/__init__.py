"""One training that prunes: its windows in turn, its past, and what it says before the first step."""
