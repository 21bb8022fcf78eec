-- Budgets: of keys (columns of api_keys_new and rate_limit_usage) and of end users, the customers of a user;
-- and the soft limits, which report spending before a budget is used up.

-- Budgets of end users
-- --------------------

-- Named by the user; '*' is the budget of every end user who has none of their own.
create table public.end_user_budgets (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    end_user text not null check (length(end_user) between 1 and 256),
    budget_nanos bigint not null check (budget_nanos >= 0),
    budget_window text not null check (budget_window in ('day', 'week', 'month', 'lifetime')),
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp()
);
create unique index end_user_budgets_name_key on public.end_user_budgets (user_id, end_user);
alter table public.end_user_budgets enable row level security;
revoke all on public.end_user_budgets from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.end_user_budgets to service_role;
revoke all on sequence public.end_user_budgets_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.end_user_budgets_id_seq to service_role;

create trigger end_user_budgets_noted after insert or delete on public.end_user_budgets
    for each row execute function public.note_spend_settings();

create table public.end_user_usage (
    user_id bigint not null references public.users (id),
    end_user text not null check (length(end_user) between 1 and 256),
    budget_since timestamptz not null default '-infinity',
    budget_spent_nanos bigint not null default 0,
    budget_held_nanos bigint not null default 0,
    budget_level smallint not null default 0,
    constraint end_user_usage_pkey primary key (user_id, end_user),
    constraint end_user_usage_sound check (least(budget_spent_nanos, budget_held_nanos) >= 0)
) with (fillfactor = 50);
comment on table public.end_user_usage is
    'Counters of end users that a budget applies to; locked with their user.';
alter table public.end_user_usage enable row level security;
revoke all on public.end_user_usage from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.end_user_usage to service_role;

-- The budget that applies to this end user: their own, else that of '*'.
create function public.end_user_budget(p_user_id bigint, p_end_user text) returns public.end_user_budgets
language plpgsql stable as $$
declare
    v_budget public.end_user_budgets;
begin
    select * into v_budget from public.end_user_budgets b
    where b.user_id = p_user_id and b.end_user in (p_end_user, '*')
    order by b.end_user = p_end_user desc limit 1;
    return v_budget;
end $$;
revoke all on function public.end_user_budget(bigint, text) from public, anon, authenticated;
grant execute on function public.end_user_budget(bigint, text) to service_role;

-- What that budget has left, or null where none applies.
create function public.end_user_left(p_user_id bigint, p_end_user text, p_now timestamptz) returns bigint
language plpgsql stable as $$
declare
    v_budget public.end_user_budgets;
    v_usage public.end_user_usage;
begin
    v_budget := public.end_user_budget(p_user_id, p_end_user);
    if v_budget.id is null then
        return null;
    end if;
    select * into v_usage from public.end_user_usage where user_id = p_user_id and end_user = p_end_user;
    if v_usage.budget_since < public.budget_start(v_budget.budget_window, p_now) then
        v_usage.budget_spent_nanos := 0;
    end if;
    return v_budget.budget_nanos - coalesce(v_usage.budget_spent_nanos + v_usage.budget_held_nanos, 0);
end $$;
revoke all on function public.end_user_left(bigint, text, timestamptz) from public, anon, authenticated;
grant execute on function public.end_user_left(bigint, text, timestamptz) to service_role;

create function public.hold_for_end_user(p_user_id bigint, p_end_user text, p_hold bigint) returns void
language plpgsql as $$
begin
    insert into public.end_user_usage as u (user_id, end_user, budget_held_nanos)
    values (p_user_id, p_end_user, p_hold)
    on conflict (user_id, end_user) do update set
        budget_held_nanos = u.budget_held_nanos + excluded.budget_held_nanos;
end $$;
revoke all on function public.hold_for_end_user(bigint, text, bigint) from public, anon, authenticated;
grant execute on function public.hold_for_end_user(bigint, text, bigint) to service_role;

-- Gives the hold back and adds the cost, as release_counters does for user and key.
create function public.release_end_user(
    p_record public.usage_records, p_cost bigint, p_now timestamptz
) returns void language plpgsql as $$
declare
    v_budget public.end_user_budgets := public.end_user_budget(p_record.user_id, p_record.end_user);
    v_since timestamptz := public.budget_start(v_budget.budget_window, p_now);
    v_spent bigint;
    v_level smallint;
    v_reached smallint;
begin
    update public.end_user_usage set
        budget_spent_nanos = greatest(
            0, case when budget_since < v_since then 0 else budget_spent_nanos end + p_cost),
        budget_level = case when budget_since < v_since then 0 else budget_level end,
        budget_since = greatest(budget_since, v_since),
        budget_held_nanos = greatest(
            0, budget_held_nanos - case when p_record.status = 'pending' then p_record.hold_nanos else 0 end)
    where user_id = p_record.user_id and end_user = p_record.end_user
    returning budget_spent_nanos, budget_level into v_spent, v_level;
    if v_level is null or v_budget.id is null or p_cost <= 0 then
        return;
    end if;
    v_reached := public.note_budget_level(
        p_record, p_record.end_user, v_budget.budget_nanos, v_budget.budget_window, v_since, v_spent, p_cost,
        v_level);
    if v_reached <> v_level then
        update public.end_user_usage set budget_level = v_reached
        where user_id = p_record.user_id and end_user = p_record.end_user;
    end if;
end $$;
revoke all on function public.release_end_user(public.usage_records, bigint, timestamptz)
    from public, anon, authenticated;
grant execute on function public.release_end_user(public.usage_records, bigint, timestamptz) to service_role;

-- Windows and soft limits
-- -----------------------

-- Soft limits that were reached: one event for each level of each window.
create table public.budget_events (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    key_id bigint references public.api_keys_new (id),
    end_user text check (length(end_user) between 1 and 256),
    level smallint not null check (level in (50, 80, 100)),
    budget_nanos bigint not null check (budget_nanos >= 0),
    spent_nanos bigint not null check (spent_nanos >= 0),
    budget_window text not null check (budget_window in ('day', 'week', 'month', 'lifetime')),
    window_start timestamptz not null,
    request_id uuid not null,
    created_at timestamptz not null default clock_timestamp(),
    constraint budget_events_subject check ((key_id is null) <> (end_user is null))
);
create index budget_events_user_idx on public.budget_events (user_id, id desc);
alter table public.budget_events enable row level security;
revoke all on public.budget_events from public, anon, authenticated, service_role;
grant select, insert, delete on public.budget_events to service_role;
revoke all on sequence public.budget_events_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.budget_events_id_seq to service_role;

-- When the current window began, in UTC; a lifetime budget never begins anew.
create function public.budget_start(p_window text, p_now timestamptz) returns timestamptz
language sql stable as $$
    select case p_window
        when 'day' then date_trunc('day', p_now, 'UTC')
        when 'week' then date_trunc('week', p_now, 'UTC')
        when 'month' then date_trunc('month', p_now, 'UTC')
        else '-infinity'::timestamptz
    end
$$;
revoke all on function public.budget_start(text, timestamptz) from public, anon, authenticated;
grant execute on function public.budget_start(text, timestamptz) to service_role;

-- The highest level, in percent, that this spending has reached; 0 below the lowest.
create function public.budget_level(p_spent bigint, p_budget bigint) returns smallint
language plpgsql immutable as $$
declare
    v_percent numeric := case when p_budget > 0 then p_spent * 100.0 / p_budget else 0 end;
begin
    return case when v_percent >= 100 then 100 when v_percent >= 80 then 80
                when v_percent >= 50 then 50 else 0 end;
end $$;
revoke all on function public.budget_level(bigint, bigint) from public, anon, authenticated;
grant execute on function public.budget_level(bigint, bigint) to service_role;

-- Returns the level to remember after p_cost more was spent. A level that is reached for the first time in
-- its window is an event, with a delivery for each active webhook; of several reached at once only the
-- highest is reported.
-- The spending before p_cost is measured by today's budget: after a raise the levels are reported anew, after
-- a cut the level that this spending reached is.
create function public.note_budget_level(
    p_record public.usage_records, p_end_user text, p_budget bigint, p_window text, p_since timestamptz,
    p_spent bigint, p_cost bigint, p_level smallint
) returns smallint language plpgsql as $$
declare
    v_level smallint := public.budget_level(p_spent, p_budget);
    v_event bigint;
begin
    if v_level > least(p_level, public.budget_level(p_spent - p_cost, p_budget)) then
        insert into public.budget_events (
            user_id, key_id, end_user, level, budget_nanos, spent_nanos, budget_window, window_start,
            request_id)
        values (p_record.user_id, case when p_end_user is null then p_record.key_id end, p_end_user, v_level,
                p_budget, p_spent, p_window, p_since, p_record.request_id)
        returning id into v_event;
        insert into public.webhook_deliveries (event_id, webhook_id, user_id)
        select v_event, w.id, w.user_id from public.webhooks w
        where w.user_id = p_record.user_id and w.is_active order by w.id;
    end if;
    return v_level;
end $$;
revoke all on function public.note_budget_level(
    public.usage_records, text, bigint, text, timestamptz, bigint, bigint, smallint
) from public, anon, authenticated;
grant execute on function public.note_budget_level(
    public.usage_records, text, bigint, text, timestamptz, bigint, bigint, smallint
) to service_role;

-- Administration of end users' budgets
-- ------------------------------------

-- A budget, what this end user has spent and holds of it, and since when the budget exists.
create function public.end_user_standing(p_user_id bigint, p_end_user text, p_now timestamptz) returns jsonb
language sql stable set search_path = '' as $$
    select jsonb_build_object(
        'end_user', p_end_user, 'budget_id', b.id, 'budget_end_user', b.end_user,
        'budget_nanos', b.budget_nanos, 'budget_window', b.budget_window,
        'window_start', nullif(public.budget_start(b.budget_window, p_now), '-infinity'),
        'spent_nanos', case when u.budget_since >= public.budget_start(b.budget_window, p_now)
                            then u.budget_spent_nanos else 0 end,
        'held_nanos', coalesce(u.budget_held_nanos, 0), 'created_at', b.created_at,
        'updated_at', b.updated_at)
    from public.end_user_budgets b
    left join public.end_user_usage u on u.user_id = p_user_id and u.end_user = p_end_user
    where b.user_id = p_user_id and b.end_user in (p_end_user, '*')
    order by b.end_user = p_end_user desc limit 1
$$;
revoke all on function public.end_user_standing(bigint, text, timestamptz) from public, anon, authenticated;
grant execute on function public.end_user_standing(bigint, text, timestamptz) to service_role;

-- The budgets, newest first, each with its end user's standing. That of '*' is one budget for each end user,
-- so nothing is spent of it.
create function public.list_end_user_budgets(p_user_id bigint, p_before bigint, p_limit int) returns jsonb
language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(public.end_user_standing(p_user_id, b.end_user, now())
                              || jsonb_build_object('created_at', b.created_at, 'updated_at', b.updated_at)
                              order by b.id desc), '[]')
    from (select * from public.end_user_budgets n
          where n.user_id = p_user_id and (p_before is null or n.id < p_before)
          order by n.id desc limit p_limit) as b
$$;
revoke all on function public.list_end_user_budgets(bigint, bigint, int) from public, anon, authenticated;
grant execute on function public.list_end_user_budgets(bigint, bigint, int) to service_role;

-- p: end_user, budget_nanos, budget_window. Outcomes: created, name_taken, too_many, not_found.
create function public.create_end_user_budget(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_budget public.end_user_budgets;
begin
    if v_user_id is null then
        return jsonb_build_object('outcome', 'not_found');
    elsif exists (select from public.end_user_budgets b
                  where b.user_id = v_user_id and b.end_user = p ->> 'end_user') then
        return jsonb_build_object('outcome', 'name_taken');
    elsif (select count(*) from public.end_user_budgets b where b.user_id = v_user_id) >= 10000 then
        return jsonb_build_object('outcome', 'too_many');
    end if;
    insert into public.end_user_budgets (user_id, end_user, budget_nanos, budget_window)
    values (v_user_id, p ->> 'end_user', (p ->> 'budget_nanos')::bigint, p ->> 'budget_window')
    returning * into v_budget;
    perform public.audit_order(
        p, 'create_end_user_budget', 'end_user_budget:' || v_budget.id, v_user_id,
        to_jsonb(v_budget) - 'user_id');
    return public.end_user_standing(v_user_id, v_budget.end_user, clock_timestamp())
        || jsonb_build_object(
            'outcome', 'created', 'created_at', v_budget.created_at, 'updated_at', v_budget.updated_at);
end $$;
revoke all on function public.create_end_user_budget(jsonb) from public, anon, authenticated;
grant execute on function public.create_end_user_budget(jsonb) to service_role;

-- p: budget_id, changes {budget_nanos, budget_window}. Outcomes: updated, not_found.
create function public.update_end_user_budget(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_budget public.end_user_budgets;
begin
    update public.end_user_budgets b set
        budget_nanos = coalesce((p -> 'changes' ->> 'budget_nanos')::bigint, b.budget_nanos),
        budget_window = coalesce(p -> 'changes' ->> 'budget_window', b.budget_window),
        updated_at = clock_timestamp()
    where b.id = (p ->> 'budget_id')::bigint and b.user_id = v_user_id returning * into v_budget;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(
        p, 'update_end_user_budget', 'end_user_budget:' || v_budget.id, v_user_id,
        to_jsonb(v_budget) - 'user_id');
    return public.end_user_standing(v_user_id, v_budget.end_user, clock_timestamp())
        || jsonb_build_object(
            'outcome', 'updated', 'created_at', v_budget.created_at, 'updated_at', v_budget.updated_at);
end $$;
revoke all on function public.update_end_user_budget(jsonb) from public, anon, authenticated;
grant execute on function public.update_end_user_budget(jsonb) to service_role;

-- p: budget_id. Outcomes: deleted, not_found.
create function public.delete_end_user_budget(p jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := public.lock_orderer(p);
    v_budget public.end_user_budgets;
begin
    delete from public.end_user_budgets b where b.id = (p ->> 'budget_id')::bigint and b.user_id = v_user_id
    returning * into v_budget;
    if not found then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    perform public.audit_order(p, 'delete_end_user_budget', 'end_user_budget:' || v_budget.id, v_user_id,
                               jsonb_build_object('end_user', v_budget.end_user));
    return jsonb_build_object('outcome', 'deleted');
end $$;
revoke all on function public.delete_end_user_budget(jsonb) from public, anon, authenticated;
grant execute on function public.delete_end_user_budget(jsonb) to service_role;
