from apex.amp.frontend import initialize, load_state_dict, master_params, state_dict
from apex.amp.handle import scale_loss

__all__ = ["initialize", "load_state_dict", "master_params", "scale_loss", "state_dict"]
