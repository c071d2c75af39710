"""Use cases of the identity slice.

``IdentityService`` says who a caller is. ``People`` keeps users, projects and domains, ``Tokens``
what callers hold, ``Accounts`` their passwords and second factors; ``Logins`` and ``Invitations``
let people in. All of them change rows and
write an event in the same transaction; whoever hears it (``IdentityService.heard``), in this server
or in another, forgets what it believed about tokens.
"""

from madang.manager.identity.service.accounts import Accounts
from madang.manager.identity.service.authentication import IdentityService
from madang.manager.identity.service.invitations import Invitations
from madang.manager.identity.service.logins import Logins
from madang.manager.identity.service.people import People
from madang.manager.identity.service.tokens import Tokens
from madang.manager.identity.service.vault import Vault

__all__ = ["Accounts", "IdentityService", "Invitations", "Logins", "People", "Tokens", "Vault"]
