/* sbatch and salloc, as the user. Slurm itself exports the options to the job's own sruns afterwards. */
#include "contexts.h"
#include "submit.h"

#include <errno.h>
#include <string.h>

int allocator_init_post_opt(const struct plugin *plugin, struct choice *choice)
{
    enum program program = strcmp(program_invocation_short_name, "salloc") ? PROGRAM_SBATCH : PROGRAM_SALLOC;
    return submit_resolve(plugin, choice, program) ? 0 : -1;
}
