-- Reports: usage by time and group, and the figures of monitors. Only reads.

-- Usage by time and group
-- -----------------------

-- A quantile of a latency histogram in milliseconds, linear within its bucket. Null for an empty histogram.
create function public.latency_quantile(p_counts numeric[], p_quantile numeric) returns bigint
language plpgsql immutable set search_path = '' as $$
declare
    v_bounds bigint[] := public.latency_bounds();
    v_wanted numeric := p_quantile * (select sum(c) from unnest(p_counts) as c);
    v_seen numeric := 0;
    v_low bigint;
    v_high bigint;
begin
    for v_i in 1 .. cardinality(p_counts) loop
        if p_counts[v_i] > 0 and v_seen + p_counts[v_i] >= v_wanted then
            v_low := case when v_i = 1 then 0 else v_bounds[v_i - 1] end;
            v_high := coalesce(v_bounds[v_i], v_low);
            return v_low + round((v_high - v_low) * (v_wanted - v_seen) / p_counts[v_i]);
        end if;
        v_seen := v_seen + p_counts[v_i];
    end loop;
    return null;
end $$;
revoke all on function public.latency_quantile(numeric[], numeric) from public, anon, authenticated;
grant execute on function public.latency_quantile(numeric[], numeric) to service_role;

-- p_bucket: hour, day, month or none. p_group: model, key, provider, environment, endpoint, status,
-- error_code, user or none.
-- The range is widened to whole slots. In UTC, days and months over whole days come from usage_days; a report
-- that neither asks for a user nor groups by key or user comes from usage_totals.
create function public.report_usage(
    p_user_id bigint, p_start timestamptz, p_end timestamptz, p_zone text, p_bucket text, p_group text,
    p_limit int
) returns jsonb language plpgsql stable set search_path = '' as $$
declare
    v_by_day boolean := p_zone = 'UTC' and p_bucket <> 'hour'
        and p_start = date_trunc('day', p_start, 'UTC') and p_end = date_trunc('day', p_end, 'UTC');
    v_total boolean := not v_by_day and p_user_id is null and p_group not in ('key', 'user');
    v_table text :=
        case when v_by_day then 'usage_days' when v_total then 'usage_totals' else 'usage_slots' end;
    v_source text := case when v_by_day then '(day::timestamp at time zone ''UTC'')' else 'slot' end;
    v_bucket text := case when p_bucket = 'none' then 'null::timestamp'
                          else format('date_trunc(%L, %s at time zone %L)', p_bucket, v_source, p_zone) end;
    v_group text := case p_group when 'none' then 'null::text' when 'key' then 'key_id::text'
                                 when 'user' then 'user_id::text' else quote_ident(p_group) end;
    v_range text :=
        case when v_by_day then '$2::date <= day and day < $3::date' else '$2 <= slot and slot < $3' end;
    v_columns text := (
        select string_agg(quote_ident(a.attname), ', ' order by a.attnum) from pg_catalog.pg_attribute a
        where a.attrelid
              = (case when v_total then 'public.usage_totals' else 'public.usage_slots' end)::regclass
          and a.attnum > 0 and not a.attisdropped);
    v_rows jsonb;
begin
    execute format($q$
        select coalesce(jsonb_agg(to_jsonb(x) order by x.bucket, x.cost_nanos desc, x."group"), '[]') from (
            select %s as bucket, %s as "group", sum(r.requests)::bigint as requests,
                   sum(r.prompt_tokens)::bigint as prompt_tokens,
                   sum(r.completion_tokens)::bigint as completion_tokens,
                   sum(r.cached_tokens)::bigint as cached_tokens,
                   sum(r.reasoning_tokens)::bigint as reasoning_tokens,
                   sum(r.cost_nanos)::bigint as cost_nanos,
                   sum(r.upstream_cost_nanos)::bigint as upstream_cost_nanos,
                   sum(r.overrun_nanos)::bigint as overrun_nanos,
                   sum(r.latency_ms_total)::bigint as latency_ms_total,
                   public.latency_quantile(
                       array[sum(r.latency_00), sum(r.latency_01), sum(r.latency_02), sum(r.latency_03),
                             sum(r.latency_04), sum(r.latency_05), sum(r.latency_06), sum(r.latency_07),
                             sum(r.latency_08), sum(r.latency_09), sum(r.latency_10), sum(r.latency_11),
                             sum(r.latency_12), sum(r.latency_13), sum(r.latency_14), sum(r.latency_15),
                             sum(r.latency_16), sum(r.latency_17), sum(r.latency_18), sum(r.latency_19),
                             sum(r.latency_20), sum(r.latency_21), sum(r.latency_22), sum(r.latency_23)],
                       0.5) as latency_p50_ms,
                   public.latency_quantile(
                       array[sum(r.latency_00), sum(r.latency_01), sum(r.latency_02), sum(r.latency_03),
                             sum(r.latency_04), sum(r.latency_05), sum(r.latency_06), sum(r.latency_07),
                             sum(r.latency_08), sum(r.latency_09), sum(r.latency_10), sum(r.latency_11),
                             sum(r.latency_12), sum(r.latency_13), sum(r.latency_14), sum(r.latency_15),
                             sum(r.latency_16), sum(r.latency_17), sum(r.latency_18), sum(r.latency_19),
                             sum(r.latency_20), sum(r.latency_21), sum(r.latency_22), sum(r.latency_23)],
                       0.95) as latency_p95_ms,
                   public.latency_quantile(
                       array[sum(r.latency_00), sum(r.latency_01), sum(r.latency_02), sum(r.latency_03),
                             sum(r.latency_04), sum(r.latency_05), sum(r.latency_06), sum(r.latency_07),
                             sum(r.latency_08), sum(r.latency_09), sum(r.latency_10), sum(r.latency_11),
                             sum(r.latency_12), sum(r.latency_13), sum(r.latency_14), sum(r.latency_15),
                             sum(r.latency_16), sum(r.latency_17), sum(r.latency_18), sum(r.latency_19),
                             sum(r.latency_20), sum(r.latency_21), sum(r.latency_22), sum(r.latency_23)],
                       0.99) as latency_p99_ms
            from (
                select %s from public.%I where %s and %s
                union all
                select %s from public.count_usage(
                    $1, greatest($2, (select summed_until from public.usage_sums_state)), $3)
            ) as r
            group by 1, 2 limit $4
        ) as x
    $q$, v_bucket, v_group,
         case when v_by_day then replace(v_columns, 'slot', 'day') else v_columns end, v_table,
         case when v_total then '$1::bigint is null' else '($1 is null or user_id = $1)' end, v_range,
         case when v_by_day then replace(v_columns, 'slot', '(slot at time zone ''UTC'')::date as day')
              else v_columns end)
    into v_rows using p_user_id, p_start, p_end, p_limit;
    return v_rows;
end $$;
revoke all on function public.report_usage(bigint, timestamptz, timestamptz, text, text, text, int)
    from public, anon, authenticated;
grant execute on function public.report_usage(bigint, timestamptz, timestamptz, text, text, text, int)
    to service_role;

-- What each of a user's customers has used, in the shape of report_usage; "group" is an end user, null for
-- requests that named none. Counted from the records themselves: sums by end user would be as many rows.
create function public.report_end_users(
    p_user_id bigint, p_start timestamptz, p_end timestamptz, p_zone text, p_bucket text, p_limit int
) returns jsonb language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(to_jsonb(x) order by x.bucket, x.cost_nanos desc, x."group"), '[]') from (
        select case when p_bucket <> 'none'
                    then date_trunc(p_bucket, r.created_at at time zone p_zone) end as bucket,
               r.end_user::text as "group", count(*) as requests,
               coalesce(sum(r.prompt_tokens), 0)::bigint as prompt_tokens,
               coalesce(sum(r.completion_tokens), 0)::bigint as completion_tokens,
               coalesce(sum(r.cached_tokens), 0)::bigint as cached_tokens,
               coalesce(sum(r.reasoning_tokens), 0)::bigint as reasoning_tokens,
               sum(r.cost_nanos)::bigint as cost_nanos,
               coalesce(sum(r.upstream_cost_nanos) filter (where not r.byok), 0)::bigint
                   as upstream_cost_nanos,
               sum(r.overrun_nanos)::bigint as overrun_nanos,
               coalesce(sum(r.latency_ms), 0)::bigint as latency_ms_total,
               percentile_disc(0.5) within group (order by coalesce(r.latency_ms, 0)) as latency_p50_ms,
               percentile_disc(0.95) within group (order by coalesce(r.latency_ms, 0)) as latency_p95_ms,
               percentile_disc(0.99) within group (order by coalesce(r.latency_ms, 0)) as latency_p99_ms
        from public.usage_records r
        where r.user_id = p_user_id and r.created_at >= p_start and r.created_at < p_end
          and r.status <> 'pending'
        group by 1, 2 limit p_limit
    ) as x
$$;
revoke all on function public.report_end_users(bigint, timestamptz, timestamptz, text, text, int)
    from public, anon, authenticated;
grant execute on function public.report_end_users(bigint, timestamptz, timestamptz, text, text, int)
    to service_role;

-- Monitors
-- --------

-- Usage by UTC day, the days that are not added up yet included; everybody's where p_user_id is null.
create function public.usage_by_day(p_user_id bigint)
returns table (user_id bigint, day date, model text, requests bigint, tokens bigint, cost_nanos bigint)
language sql stable set search_path = '' as $$
    select d.user_id, d.day, d.model, d.requests, d.prompt_tokens + d.completion_tokens, d.cost_nanos
    from public.usage_days d where p_user_id is null or d.user_id = p_user_id
    union all
    select s.user_id, (s.slot at time zone 'UTC')::date, s.model, s.requests,
           s.prompt_tokens + s.completion_tokens, s.cost_nanos
    from public.count_usage(p_user_id, (select summed_until from public.usage_sums_state), 'infinity') s
$$;
revoke all on function public.usage_by_day(bigint) from public, anon, authenticated;
grant execute on function public.usage_by_day(bigint) to service_role;

-- A user's figures of all time, today and this month (UTC); everybody's where p_user_id is null.
create function public.usage_metrics(p_user_id bigint) returns jsonb
language sql stable set search_path = '' as $$
    with days as (
        select day, model, sum(requests) as requests, sum(tokens) as tokens, sum(cost_nanos) as cost
        from public.usage_by_day(p_user_id) group by 1, 2
    ), today as (select (now() at time zone 'UTC')::date as day)
    select jsonb_build_object(
        'total_requests', coalesce(sum(requests), 0), 'total_tokens', coalesce(sum(tokens), 0),
        'total_cost_nanos', coalesce(sum(cost), 0),
        'requests_today', coalesce(sum(requests) filter (where d.day = t.day), 0),
        'tokens_today', coalesce(sum(tokens) filter (where d.day = t.day), 0),
        'cost_today_nanos', coalesce(sum(cost) filter (where d.day = t.day), 0),
        'requests_this_month', coalesce(sum(requests) filter (where d.day >= date_trunc('month', t.day)), 0),
        'tokens_this_month', coalesce(sum(tokens) filter (where d.day >= date_trunc('month', t.day)), 0),
        'cost_this_month_nanos', coalesce(sum(cost) filter (where d.day >= date_trunc('month', t.day)), 0),
        'most_used_model', (
            select m.model from days m group by m.model order by sum(m.requests) desc, m.model limit 1),
        'last_request_time', (
            select u.last_used_at from public.rate_limit_usage u
            where u.subject = 'user' and u.subject_id = p_user_id))
    from (select) as one left join days d on true left join today t on true
$$;
revoke all on function public.usage_metrics(bigint) from public, anon, authenticated;
grant execute on function public.usage_metrics(bigint) to service_role;

-- What an administrator sees of the whole installation.
create function public.system_metrics() returns jsonb language sql stable set search_path = '' as $$
    select jsonb_build_object(
        'total_users', (select count(*) from public.users where deleted_at is null),
        'active_users_today', (
            select count(distinct d.user_id) from public.usage_by_day(null) d
            where d.day = (now() at time zone 'UTC')::date),
        'metrics', public.usage_metrics(null),
        'top_users', (select coalesce(jsonb_agg(to_jsonb(t)), '[]') from (
            select d.user_id, u.username, sum(d.requests) as requests, sum(d.tokens) as tokens,
                   sum(d.cost_nanos) as cost_nanos
            from public.usage_by_day(null) d join public.users u on u.id = d.user_id
            where d.day >= date_trunc('month', now() at time zone 'UTC') group by 1, 2
            order by 5 desc, 3 desc, 1 limit 10) as t),
        'recent', (select coalesce(jsonb_agg(to_jsonb(t)), '[]') from (
            select request_id, user_id, key_id, endpoint, model, status, cost_nanos, created_at
            from public.usage_records order by request_id desc limit 20) as t))
$$;
revoke all on function public.system_metrics() from public, anon, authenticated;
grant execute on function public.system_metrics() to service_role;
