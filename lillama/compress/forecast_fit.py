"""Constants of `forecast`, written by `python -m benchmarks.forecast --write` from the
measured runs in benchmarks/results: edit neither, run it again.

factor: the error bar, either way. worst: how many times what the others foretell the
worst cell lost. smallest, largest: expected losses among the cells.
"""

__all__ = ["LOSS", "SECONDS"]

LOSS = {
    "fast": {
        "excess": {
            "intercept": -1.098,
            "slope": 1.004,
            "factor": 1.97,
            "worst": 2.36,
            "smallest": 0.0798,
            "largest": 1.5416,
            "cells": 6,
        },
        "kl": {
            "intercept": -0.771,
            "slope": 0.916,
            "factor": 1.55,
            "worst": 1.77,
            "smallest": 0.0798,
            "largest": 1.5416,
            "cells": 6,
        },
    },
    "default": {
        "excess": {
            "intercept": -1.412,
            "slope": 1.269,
            "factor": 1.31,
            "worst": 1.63,
            "smallest": 0.0158,
            "largest": 1.0296,
            "cells": 11,
        },
        "kl": {
            "intercept": -1.061,
            "slope": 1.065,
            "factor": 1.24,
            "worst": 1.54,
            "smallest": 0.0158,
            "largest": 1.0296,
            "cells": 11,
        },
    },
}
SECONDS = {
    "attention": {"excess": 2.32, "factor": 1.9, "runs": 7},
    "scan": {"excess": 4.7, "factor": 1.57, "runs": 7},
}
