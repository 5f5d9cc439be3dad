# llmkit as a service that the hub starts, on one machine (TLJH, a lab's server). Add this to your
# jupyterhub_config.py; see docs/hub.md. Install llmkit by `pip install ".[hub]"` where the hub is,
# and by `pip install .` where notebooks run.
c = get_config()  # noqa: F821

USE, ADMIN = "access:services!service=llmkit", "custom:llmkit:admin"

c.JupyterHub.services = [
    {
        "name": "llmkit",
        "url": "http://127.0.0.1:3000",
        # The whole path, as `which llmkit` says it: a hub's own PATH may be another.
        "command": ["/opt/hub/bin/llmkit", "hub", "--config", "/etc/llmkit/hub.toml", "smollm2"],
        # Its database and models; the hub's own user must be able to write there.
        "environment": {"HOME": "/var/lib/llmkit"},
        "oauth_no_confirm": True,
        "oauth_client_allowed_scopes": [USE, ADMIN],
    }
]
c.JupyterHub.custom_scopes = {ADMIN: {"description": "Load models and see everybody's usage"}}
c.JupyterHub.load_roles = [
    # All users. For some only: another name, and "groups": ["students"].
    {"name": "user", "scopes": ["self", USE]},
    {"name": "llmkit-admin", "scopes": [ADMIN], "users": ["instructor"]},
]
# The token of each notebook server may use it too: llmkit.attach("hub").
c.Spawner.server_token_scopes = ["users:activity!user", "access:servers!server", USE]
c.Spawner.environment = {"LLMKIT_HUB_URL": "http://127.0.0.1:8000/services/llmkit/"}
