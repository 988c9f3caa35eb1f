"""The `nla` command and the scripts behind it."""
