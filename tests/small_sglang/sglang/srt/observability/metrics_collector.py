class SchedulerMetricsCollector:
    def __init__(self, labels):
        self.labels = labels

    def log_stats(self, stats):
        pass
