"""Constants of `forecast`, written by `python -m benchmarks.forecast --write` from the
measured runs in benchmarks/results: edit neither, run it again.

factor: the error bar, either way. worst: how many times what the others foretell the
worst cell lost. smallest, largest: expected losses among the cells.
"""

__all__ = ["LOSS", "SECONDS"]

LOSS = {
    "fast": {
        "excess": {
            "intercept": -0.663,
            "slope": 1.655,
            "factor": 5.55,
            "worst": 9.34,
            "smallest": 0.0149,
            "largest": 1.5416,
            "cells": 6,
        },
        "kl": {
            "intercept": -0.608,
            "slope": 1.179,
            "factor": 2.02,
            "worst": 2.91,
            "smallest": 0.0149,
            "largest": 1.5416,
            "cells": 6,
        },
    },
    "default": {
        "excess": {
            "intercept": -1.4,
            "slope": 1.274,
            "factor": 1.33,
            "worst": 1.62,
            "smallest": 0.0158,
            "largest": 1.0296,
            "cells": 10,
        },
        "kl": {
            "intercept": -1.043,
            "slope": 1.071,
            "factor": 1.26,
            "worst": 1.54,
            "smallest": 0.0158,
            "largest": 1.0296,
            "cells": 10,
        },
    },
}
SECONDS = {
    "attention": {"excess": 2.32, "factor": 1.9, "runs": 7},
    "scan": {"excess": 4.7, "factor": 1.57, "runs": 7},
}
