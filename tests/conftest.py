"""Nothing here asks the network: said before any library that reads it at import is loaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
