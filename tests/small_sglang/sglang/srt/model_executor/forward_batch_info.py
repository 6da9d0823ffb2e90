class ForwardBatch:
    def __init__(self, input_ids):
        self.input_ids = input_ids

    @classmethod
    def init_new(cls, batch, model_runner):
        return cls(batch.input_ids)
