"""The DeepSpeed JSON: its "auto" values, the options of the rules, and what is refused."""
