"""Fine-tuning runs: what the scripts in launch/ do."""
