"""Constants of `forecast`, written by `python -m benchmarks.forecast --write` from the
measured runs in benchmarks/results: edit neither, run it again.

factor: the error bar, either way. worst: how many times what the others foretell the
worst cell lost. smallest, largest: expected losses among the cells.
"""

__all__ = ["LOSS", "SECONDS"]

LOSS = {
    "fast": {
        "excess": {
            "intercept": -0.855,
            "slope": 1.359,
            "factor": 2.61,
            "worst": 5.25,
            "smallest": 0.0215,
            "largest": 1.5416,
            "cells": 7,
        },
        "kl": {
            "intercept": -0.71,
            "slope": 1.044,
            "factor": 1.69,
            "worst": 2.8,
            "smallest": 0.0215,
            "largest": 1.5416,
            "cells": 7,
        },
    },
    "default": {
        "excess": {
            "intercept": -0.726,
            "slope": 1.52,
            "factor": 2.9,
            "worst": 2.26,
            "smallest": 0.0215,
            "largest": 0.3556,
            "cells": 6,
        },
        "kl": {
            "intercept": -0.921,
            "slope": 1.092,
            "factor": 1.51,
            "worst": 1.65,
            "smallest": 0.0215,
            "largest": 0.3556,
            "cells": 6,
        },
    },
}
SECONDS = {
    "attention": {"excess": 2.32, "factor": 1.9, "runs": 7},
    "scan": {"excess": 4.7, "factor": 1.57, "runs": 7},
}
