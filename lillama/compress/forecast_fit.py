"""Constants of `forecast`, written by `python -m benchmarks.forecast --write` from the
measured runs in benchmarks/results: edit neither, run it again.

factor: the error bar, either way. worst: how many times what the others foretell the
worst cell lost. smallest, largest: expected losses among the cells.
"""

__all__ = ["LOSS", "SECONDS"]

LOSS = {
    "fast": {
        "excess": {
            "intercept": -0.985,
            "slope": 1.059,
            "factor": 2.52,
            "worst": 5.34,
            "smallest": 0.0773,
            "largest": 1.942,
            "cells": 10,
        },
        "kl": {
            "intercept": -0.472,
            "slope": 1.207,
            "factor": 2.32,
            "worst": 4.39,
            "smallest": 0.0135,
            "largest": 1.942,
            "cells": 12,
        },
    },
    "default": {
        "excess": {
            "intercept": -1.323,
            "slope": 1.291,
            "factor": 1.74,
            "worst": 3.34,
            "smallest": 0.0798,
            "largest": 0.8925,
            "cells": 10,
        },
        "kl": {
            "intercept": -0.929,
            "slope": 1.109,
            "factor": 1.54,
            "worst": 2.69,
            "smallest": 0.0138,
            "largest": 0.8925,
            "cells": 13,
        },
    },
}
SECONDS = {
    "attention": {"excess": 2.32, "factor": 1.9, "runs": 7},
    "scan": {"excess": 4.7, "factor": 1.57, "runs": 7},
}
