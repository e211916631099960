/* sbatch and salloc, as the user. Slurm itself exports the options to the job's own sruns afterwards. */
#include "contexts.h"
#include "submit.h"

int allocator_init_post_opt(const struct plugin *plugin, const struct choice *choice)
{
    return submit_resolve(plugin, choice) ? 0 : -1;
}
