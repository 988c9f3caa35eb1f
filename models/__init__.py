"""Language models as pure functions over parameter trees: configs, layers, sampling, conversion."""
