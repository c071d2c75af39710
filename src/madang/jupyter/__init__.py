"""For Jupyter on the user's machine: single kernels run in sessions of a server.

::

    JupyterLab ── ZMQ ── bridge ── WebSocket ── /jupyter/USER of the server ── session
                   └ started and ended by the provisioner, or by a plain kernel.json

Needs the extra ``madang[jupyter]``. Where a whole Jupyter server shall use Madang's kernels, none
of this is needed: give it ``--gateway-url`` (docs/howto/jupyter.md).
"""
