"""What happens around the steps: stage transitions, monitoring, alarms."""
