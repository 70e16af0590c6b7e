//! What every implementation keeps to: one function for each promise, run against each of them by [`keeps_its_promises`].

mod builds;
mod catalog;
mod data;
mod events;
mod keys;
mod sandboxes;

pub(crate) use builds::*;
pub(crate) use catalog::*;
pub(crate) use data::{Subject, begin, live, quota, row};
pub(crate) use events::*;
pub(crate) use keys::*;
pub(crate) use sandboxes::*;

/// A test for each promise. `$subject`: makes a [`Subject`].
macro_rules! keeps_its_promises {
    ($subject:expr => $($promise:ident)*) => {
        $(
            #[tokio::test(start_paused = true)]
            async fn $promise() {
                crate::database::suite::$promise(&$subject).await;
            }
        )*
    };
    ($subject:expr) => {
        keeps_its_promises! { $subject =>
            what_is_begun_is_seen_once_it_is_committed
            what_is_undone_leaves_no_key_and_what_has_ended_does
            what_exceeds_a_limit_is_not_written
            the_newer_state_of_a_sandbox_stays
            a_row_is_changed_by_its_own_node_alone
            lists_are_narrowed_ordered_and_continued
            what_is_resumed_or_paused_counts_as_both
            a_key_gives_its_answer_until_it_is_forgotten
            a_key_is_one_requests_whoever_asks_first
            what_is_cached_of_keys_and_limits_learns_of_each_change
            a_wall_clock_that_jumps_and_a_restart_end_no_key_early_or_late
            after_a_reboot_keys_are_as_old_as_the_wall_clock_and_the_boot_say
            api_keys_and_limits_are_there_until_they_are_removed
            a_name_is_the_newest_snapshots
            snapshots_are_their_nodes
            tags_move_and_go_together
            a_build_ends_once_and_gives_its_template_tags
            a_version_is_unnamed_since_its_last_tag_moved
            a_template_is_its_first_projects
            builds_that_are_too_old_are_forgotten
            what_a_projects_builds_said_is_bounded
            what_a_build_said_is_read_from_both_ends
            measurements_are_of_sandboxes_that_are_there
            the_audit_log_is_read_backwards
            what_becomes_of_a_sandbox_is_told_once_and_in_order
            there_is_no_event_of_what_was_not_recorded
            what_was_written_is_there_for_the_next_server
        }
    };
}
pub(crate) use keeps_its_promises;
