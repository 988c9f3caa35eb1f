"""The offline benchmark: what a pair's numbers are, each with its interval and its controls (`nla eval`).

`dataset` chooses the rows, `context` holds the pair and the texts drawn for them, each suite (`fve`, `downstream`,
`retrieval`, ...) turns both into a `SuiteResult`, and `run` does the suites one after another and keeps what is done.
"""
