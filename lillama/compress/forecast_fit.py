"""Constants of `forecast`, written by `python -m benchmarks.forecast --write` from the
measured runs in benchmarks/results: edit neither, run it again.

factor: the error bar, either way. worst: how many times what the others foretell the
worst cell lost. smallest, largest: expected losses among the cells.
"""

__all__ = ["LOSS", "SECONDS"]

LOSS = {
    "fast": {
        "excess": {
            "intercept": -1.078,
            "slope": 1.014,
            "factor": 2.19,
            "worst": 5.15,
            "smallest": 0.0766,
            "largest": 8.8551,
            "cells": 12,
        },
        "kl": {
            "intercept": -0.658,
            "slope": 1.137,
            "factor": 2.16,
            "worst": 4.54,
            "smallest": 0.0133,
            "largest": 8.8551,
            "cells": 14,
        },
    },
    "default": {
        "excess": {
            "intercept": -1.812,
            "slope": 0.974,
            "factor": 1.98,
            "worst": 3.68,
            "smallest": 0.0798,
            "largest": 10.4874,
            "cells": 13,
        },
        "kl": {
            "intercept": -1.291,
            "slope": 0.962,
            "factor": 1.8,
            "worst": 3.15,
            "smallest": 0.0138,
            "largest": 10.4874,
            "cells": 16,
        },
    },
}
SECONDS = {
    "attention": {"excess": 2.32, "factor": 1.9, "runs": 7},
    "scan": {"excess": 4.7, "factor": 1.57, "runs": 7},
}
