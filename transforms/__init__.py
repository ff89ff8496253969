"""What happens to a sample: pure array functions and their MONAI-style dictionary transforms (suffix ``d``).

What can be imported from here stands in ``__init__.pyi``. It is loaded when it is first asked for: the command line
needs only ``transforms.errors``, and MONAI takes seconds to load.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
