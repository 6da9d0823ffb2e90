#!/usr/bin/env bash
# Breaks the pool in one place at a time and runs the schedules that should notice. A change that
# passes, or that no longer applies, is an error.
#   usage: schedule_mutants.sh FOLDER COMPILER FLAGS...
# FOLDER holds schedule.o and test_schedules.o; main.o is beside it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$1
shift
failed=0

compile=("$@")

# mutant SCENARIO WHAT SED-SCRIPT; the script sees the whole file as one line.
mutant() {
  local scenario=$1 what=$2 script=$3 status=0
  sed -zE "$script" "$here/../pool.cpp" > "$folder/mutant.cpp"
  if cmp -s "$folder/mutant.cpp" "$here/../pool.cpp"; then
    echo "DOES NOT APPLY  $what"
    failed=1
    return
  fi
  "${compile[@]}" -O0 -w -I"$here/.." -DPYSTAGE_SCHEDULED "$folder/mutant.cpp" \
    "$folder/../main.o" "$folder/schedule.o" "$folder/test_schedules.o" -o "$folder/mutant"
  {
    PYSTAGE_SCENARIO=$scenario timeout 300 "$folder/mutant" -tc='every schedule*'
  } > "$folder/mutant.log" 2>&1 || status=$?
  case $status in
    0) echo "NOT CAUGHT      $what (in \"$scenario\")" && failed=1 ;;
    124) echo "NO END          $what (in \"$scenario\")" && failed=1 ;;
    *) echo "caught          $what: $(grep -om1 "$scenario: .*" "$folder/mutant.log" |
         cut -d: -f2- || echo " it crashes")" ;;
  esac
}

mutant reuse "no fence is asked" \
  's/const bool done = device_.query\(asked->fence\);/const bool done = true;/'
mutant vouch "a fence vouches for all of its stream" \
  's/ && reader->ticket <= ticket;/;/'
mutant vouch "the ticket is drawn before the launch" \
  's/(  try \{\n    pool_->device_.launch)(.*)(  reader->ticket = [^\n]*\n)/\3\1\2/'
mutant vouch "the fence is recorded before the ticket is drawn" \
  's/(  reader->ticket = [^\n]*\n)(  try \{\n    pool_->device_.record[^\n]*\n)/\2  \1/'
mutant "shared lease" "a slot is free when its first reader is" \
  's/if \(--slot->pending > 0\) return;/--slot->pending;/'
mutant reuse "a slot in flight is free" \
  's/\} else if \(!lease.readers_\) \{/} else if (true) {/'
mutant "two looks" "two threads look through the queues at once" \
  's/if \(reaping_ \|\| !in_flight_slots_\)/if (!in_flight_slots_)/'
mutant raise "nobody waits for another thread's look" \
  's/if \(give_up \&\& \(reaping_ \|\|/if (give_up \&\& (/'
mutant "raise and grow" "nobody waits for another thread's growth" \
  's/if \(give_up \&\& \(reaping_ \|\| allocating_ \|\|/if (give_up \&\& (reaping_ ||/'
mutant wake-up "the end of a lease wakes nobody" \
  's/(free_.insert\(std::move\(slot->node\)\);\n)  slot_freed_.notify_all\(\);\n(\}\n\nReader)/\1\2/'
mutant grow "an allocation counts from when it is made" \
  's/  reserved_bytes_ \+= bytes;\n//; s/  \+\+allocations_;/  reserved_bytes_ += bytes;\n&/'
mutant grow "freed memory wakes nobody" \
  's/  slot_freed_.notify_all\(\);  \/\/ there is room[^\n]*//'
mutant "failed allocation" "a failed allocation wakes nobody" \
  's/    slot_freed_.notify_all\(\);  \/\/ others may[^\n]*//'
mutant "failed allocation" "a failed allocation counts" \
  's/    reserved_bytes_ -= bytes;\n    put_by/    put_by/'
mutant "close and wait" "close wakes nobody" \
  's/closed_ = true;\n    slot_freed_.notify_all\(\);/closed_ = true;/'
mutant "close and grow" "a closed pool keeps what it grew" \
  's/finish_if_closed\(lock\);  \/\/ close\(\) may[^\n]*//'
mutant drop "an orphan is put away twice" \
  's/in_flight_slots_ \&\& !orphaned_/in_flight_slots_/'
mutant "two orphans" "orphans are put away without a look at the others" \
  's/while \(!g_orphans.compare_exchange_weak\(next_orphan_, this\)\)/g_orphans.store(this); while (false)/'
mutant "given up" "a wait that is given up does not count" \
  's/if \(waiting\) total \+= seconds\(\);/if (waiting \&\& !std::uncaught_exceptions()) total += seconds();/'
exit $failed
