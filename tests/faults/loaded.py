"""All that the commands import while they run, so that a kill meets their work and not an import."""

import dmquant.pipelines.commands.listing
import dmquant.pipelines.commands.stages
import dmquant.pipelines.runs.compare
import dmquant.pipelines.sweep.sweep  # noqa: F401
