-- What each of a user's customers has used. Counted from the records themselves: sums by end user would be as many rows.

-- The rows of report_usage, whose "group" is an end user, null for requests that named none.
create function public.report_end_users(
    p_user_id bigint, p_start timestamptz, p_end timestamptz, p_zone text, p_bucket text, p_limit int
) returns jsonb language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(to_jsonb(x) order by x.bucket, x.cost_nanos desc, x."group"), '[]') from (
        select case when p_bucket <> 'none' then date_trunc(p_bucket, r.created_at at time zone p_zone) end as bucket,
               r.end_user::text as "group", count(*) as requests, coalesce(sum(r.prompt_tokens), 0)::bigint as prompt_tokens,
               coalesce(sum(r.completion_tokens), 0)::bigint as completion_tokens, coalesce(sum(r.cached_tokens), 0)::bigint as cached_tokens,
               coalesce(sum(r.reasoning_tokens), 0)::bigint as reasoning_tokens, sum(r.cost_nanos)::bigint as cost_nanos,
               coalesce(sum(r.upstream_cost_nanos) filter (where not r.byok), 0)::bigint as upstream_cost_nanos,
               sum(r.overrun_nanos)::bigint as overrun_nanos, coalesce(sum(r.latency_ms), 0)::bigint as latency_ms_total,
               percentile_disc(0.5) within group (order by coalesce(r.latency_ms, 0)) as latency_p50_ms,
               percentile_disc(0.95) within group (order by coalesce(r.latency_ms, 0)) as latency_p95_ms,
               percentile_disc(0.99) within group (order by coalesce(r.latency_ms, 0)) as latency_p99_ms
        from public.usage_records r
        where r.user_id = p_user_id and r.created_at >= p_start and r.created_at < p_end and r.status <> 'pending'
        group by 1, 2 limit p_limit
    ) as x
$$;
revoke all on function public.report_end_users(bigint, timestamptz, timestamptz, text, text, int) from public, anon, authenticated;
grant execute on function public.report_end_users(bigint, timestamptz, timestamptz, text, text, int) to service_role;

-- As before, and since when the budget is there.
create or replace function public.end_user_standing(p_user_id bigint, p_end_user text, p_now timestamptz) returns jsonb
language sql stable set search_path = '' as $$
    select jsonb_build_object(
        'end_user', p_end_user, 'budget_id', b.id, 'budget_end_user', b.end_user, 'budget_nanos', b.budget_nanos,
        'budget_window', b.budget_window, 'window_start', nullif(public.budget_start(b.budget_window, p_now), '-infinity'),
        'spent_nanos', case when u.budget_since >= public.budget_start(b.budget_window, p_now) then u.budget_spent_nanos else 0 end,
        'held_nanos', coalesce(u.budget_held_nanos, 0), 'created_at', b.created_at, 'updated_at', b.updated_at)
    from public.end_user_budgets b
    left join public.end_user_usage u on u.user_id = p_user_id and u.end_user = p_end_user
    where b.user_id = p_user_id and b.end_user in (p_end_user, '*')
    order by b.end_user = p_end_user desc limit 1
$$;

create or replace function public.schema_version() returns bigint language sql immutable set search_path = '' as $$
    select 20261130100100::bigint
$$;

notify pgrst, 'reload schema';
