"""Every editor judged on simulated patients that no release was trained on."""
