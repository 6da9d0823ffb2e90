ACTORS = []


def _create_scheduler_actor(pg, server_args, rank):
    ACTORS.append((pg, server_args, rank))
