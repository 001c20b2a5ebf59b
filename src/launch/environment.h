// What the environment says: ranks, Hugging Face's folders. Read here and passed on as values.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace uly::launch {

// A variable's value; nothing where it is not set. Set to nothing is a value: "".
std::optional<std::string> variable(const std::string& name);

// A text that is a whole number and nothing else.
std::optional<int64_t> whole_number(std::string_view text);

// This process's place in a job that somebody else has started.
struct Place {
  int64_t rank = 0, world_size = 1;
  int64_t local_rank = 0, local_world_size = 1;
  std::string master_address;
  int master_port = 0;
};

// Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT; where RANK and WORLD_SIZE are not set, what srun
// or mpirun say of a job of several processes: SLURM_PROCID, OMPI_COMM_WORLD_RANK, PMI_RANK and the like. Nothing where nobody has
// started such a job. Throws UserError naming the variable that is no number, out of range, or missing.
std::optional<Place> place_in_job();

// Nobody else's guess: names a job's keys where its ranks meet.
std::string job_token();

// Puts a place into this process's environment, for the program that it becomes.
void set_place(const Place& place);

// The first host of SLURM's "node[01-03,7],other".
std::string first_of_hosts(const std::string& list);

// The folder where huggingface_hub keeps repositories: HF_HUB_CACHE, else HUGGINGFACE_HUB_CACHE, else HF_HOME/hub, else
// XDG_CACHE_HOME/huggingface/hub, else ~/.cache/huggingface/hub. `~` and $VARIABLES are expanded as it does.
std::string hub_cache_folder();

// What `doctor --measure` has found: ULYSSES_RATES, else XDG_CONFIG_HOME/ulysses/rates.json, else ~/.config/ulysses/rates.json.
std::string rates_path();

// Whether a token for the hub is at hand: HF_TOKEN or a stored one.
bool has_hub_token();

// The folder of the running program.
std::string program_folder();

// This project's other programs: ULYSSES_ENGINE and ULYSSES_PYTHON where set, else beside the program (ulysses-engine,
// ../.venv/bin/python). The files need not exist.
std::string engine_path();
std::string python_path();

// The whole environment as NAME=value, with `changes` applied (no value: removed).
std::vector<std::string> environment_with(const std::vector<std::pair<std::string, std::optional<std::string>>>& changes);

}  // namespace uly::launch
