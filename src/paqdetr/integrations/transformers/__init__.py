"""PaQ for detectors of Hugging Face transformers, pretrained ones too.

```python
from paqdetr.integrations.transformers import attach, detach, from_pretrained

model = attach(DeformableDetrForObjectDetection.from_pretrained(...))   # the same outputs, until it is trained
model.save_pretrained("mine")
model = from_pretrained("mine")
```

docs/plugin.md says what is mixed into what for each class.
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "paqdetr.integrations.transformers needs transformers: pip install 'paqdetr[transformers]'"
    ) from error

from paqdetr.integrations.transformers.attach import OneToManyUntil, attach, detach, from_pretrained
from paqdetr.integrations.transformers.hosts import HOSTS, Host
from paqdetr.integrations.transformers.plugin import PaqPlugin, PaqSettings

__all__ = ["HOSTS", "Host", "OneToManyUntil", "PaqPlugin", "PaqSettings", "attach", "detach", "from_pretrained"]
