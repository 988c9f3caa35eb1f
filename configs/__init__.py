"""Run configurations: data only, nothing here imports the rest of the package."""
