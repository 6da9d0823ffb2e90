def validate_input_length(req, longest):
    return "too long" if len(req.origin_input_ids) > longest else None
