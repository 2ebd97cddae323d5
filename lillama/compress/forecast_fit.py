"""placeholder until the script has written it"""

LOSS = {
    p: {
        k: {"intercept": 0.0, "slope": 1.0, "factor": 2.0, "smallest": 0.0, "largest": 1.0}
        for k in ("excess", "kl")
    }
    for p in ("fast", "default")
}
SECONDS = {k: {"excess": 1.0, "factor": 2.0} for k in ("attention", "scan")}
