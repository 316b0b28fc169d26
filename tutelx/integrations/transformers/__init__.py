"""transformers 5: an experts implementation named "tutelx" in the library's own registry, there once this is imported.

    import tutelx.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="tutelx")
    model.set_experts_implementation("tutelx")

`tutelx.wrap(model)` does the same module by module, after a look at the numbers. The library keeps its routers, its
parameters and its checkpoints; only the experts' forward is another one.
"""

from tutelx.integrations.transformers.across import whole_state_dict
from tutelx.integrations.transformers.experts import experts_forward
from tutelx.integrations.transformers.registry import NAME, register
from tutelx.integrations.transformers.setting import Setting, setting_of

__all__ = ["NAME", "Setting", "experts_forward", "setting_of", "whole_state_dict"]

register()
