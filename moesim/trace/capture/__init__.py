"""Record the routing of a live torch model by watching its routers.

    with capture(model) as recorder:
        with recorder.request("r1", task="qa"):
            model.generate(**inputs, max_new_tokens=64)
    trace = recorder.trace()

Needs the extra `capture` (torch; transformers 5 or later for Hugging Face models). Importing this package loads
neither.
"""

from moesim.trace.capture.recorder import Recorder, capture

__all__ = ["Recorder", "capture"]
