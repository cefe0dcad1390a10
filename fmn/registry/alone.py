"""Answer for a logged model in a process without fmn, as on the machine that will serve it.

This file is run as a script. Each line of its input is a request in JSON: ``{"load": URI, "store":
URI}`` loads a model from MLflow's store, ``{"rows": [...], "params": {...}}`` asks it. The answer
is a line, ``{"rows": [...]}`` or ``{"error": "..."}``.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    sys.modules["fmn"] = None  # type: ignore[assignment]  # `import fmn` fails
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard error instead
    import mlflow.pyfunc
    import pandas as pd
    import transformers  # noqa: F401 - imported while the model is still being logged

    model: Any = None
    for line in sys.stdin:
        request, rows = json.loads(line), []
        try:
            if "load" in request:
                mlflow.set_tracking_uri(request["store"])
                model = mlflow.pyfunc.load_model(request["load"])
            else:
                table = model.predict(pd.DataFrame(request["rows"]), params=request["params"])
                rows = table.to_dict("records")
            answer = json.dumps({"rows": rows}, default=lambda value: value.tolist())
        except Exception as error:  # the caller reports any failure
            answer = json.dumps({"error": f"{type(error).__name__}: {error}"})
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
