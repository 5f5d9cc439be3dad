"""Requests that schemathesis makes up, with short answers: what is tested is how they are read.
Values that are wrong stay wrong."""

import schemathesis

LENGTHS = {
    "/v1/chat/completions": "max_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
    "/api/chat": "num_predict",
    "/api/generate": "num_predict",
    "/v1/generate": "max_tokens",
    "/completions": "max_tokens",
    "/chat/completions": "max_tokens",
    "/completion": "n_predict",
    "/infill": "n_predict",
    "/api/completions": "max_tokens",
    "/api/completions/stream": "max_tokens",
    "/api/chat/stream": "max_tokens",
    "/api/generate/stream": "max_tokens",
}


@schemathesis.hook
def before_call(context, case, kwargs):
    name, body = LENGTHS.get(case.operation.path), case.body
    if name is None or not isinstance(body, dict):
        return
    if name == "num_predict":
        body = body.setdefault("options", {})
    if not isinstance(body, dict):
        return
    for field, most in ((name, 4), ("max_completion_tokens", 4), ("n", 2), ("best_of", 2)):
        value = body.get(field)
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            body[field] = most
    if body.get(name) is None:
        body[name] = 4


# What llama-server answers so too, where a model or a server lacks something.
LACKING = ("/infill", "/props", "/slots/{id_slot}")


@schemathesis.hook
def after_call(context, case, response):
    if case.operation.path in LACKING and response.status_code == 501:
        response.status_code = 400
