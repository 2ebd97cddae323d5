"""Constants of `forecast`, written by `python -m benchmarks.forecast --write` from the
measured runs in benchmarks/results: edit neither, run it again.

factor: the error bar, either way. worst: how many times what the others foretell the
worst cell lost. smallest, largest: expected losses among the cells.
"""

__all__ = ["LOSS", "SECONDS"]

LOSS = {
    "fast": {
        "excess": {
            "intercept": -0.63,
            "slope": 1.657,
            "factor": 7.67,
            "worst": 9.83,
            "smallest": 0.0149,
            "largest": 1.5416,
            "cells": 5,
        },
        "kl": {
            "intercept": -0.545,
            "slope": 1.183,
            "factor": 2.36,
            "worst": 2.82,
            "smallest": 0.0149,
            "largest": 1.5416,
            "cells": 5,
        },
    },
    "default": {
        "excess": {
            "intercept": -1.426,
            "slope": 1.243,
            "factor": 1.11,
            "worst": 1.16,
            "smallest": 0.0158,
            "largest": 0.9812,
            "cells": 6,
        },
        "kl": {
            "intercept": -1.072,
            "slope": 1.062,
            "factor": 1.17,
            "worst": 1.23,
            "smallest": 0.0158,
            "largest": 0.9812,
            "cells": 6,
        },
    },
}
SECONDS = {
    "attention": {"excess": 2.32, "factor": 1.9, "runs": 7},
    "scan": {"excess": 4.7, "factor": 1.57, "runs": 7},
}
